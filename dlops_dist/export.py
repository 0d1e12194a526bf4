"""Write the result of a run as a file for other programs, once it is seen to compute what the model computes.

    python -m dlops_dist.export runs/NAME --format onnx             runs/NAME/export/NAME.onnx, for onnxruntime
    python -m dlops_dist.export runs/NAME --format torch-export     ... .pt2, for torch.export.load
    python -m dlops_dist.export runs/NAME --format safetensors      ... .safetensors, the weights alone

The first two are functions of uint8 images (N, H, W, 3), for any N, that give logits (N, C) and embeddings (N, D) as
they are evaluated: normalised inside, by the averaged weights where the run keeps some, in float32. Beside it each file
holds classes, mean, std, image_size and recipe, as JSON.

Before a file gets its name it is loaded, and compared with the model on images of the run's shards in batches of 1, 3
and 8. Where it differs by more than 16 times what the model itself rounds on them (as its outputs in float64 show),
there is no file, and the exit code is 1.
"""

import argparse
import io
import json
import sys
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dlops_dist.errors import OneLineParser, RunError, UserError, exit_code_of, first_line

NEEDED = {"onnx": ["onnx", "onnxscript", "onnxruntime"], "torch-export": [], "safetensors": ["safetensors"]}
"""Packages of each format, beside torch."""


def main() -> None:
    parser = OneLineParser(
        prog="python -m dlops_dist.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of the run, or its URL")
    parser.add_argument("--format", required=True, choices=NEEDED, help="what kind of file")
    parser.add_argument("--out", metavar="FILE", help="by default in the run's folder export/")
    parser.add_argument("--recipe", help="of a run of your own recipe: its file, or its module's name")
    arguments = parser.parse_args()
    for package in NEEDED[arguments.format]:
        if find_spec(package) is None:
            raise UserError(f"--format: {package} is not installed; run pip install 'dlops_dist[export]'")
    export(arguments.run, arguments.format, arguments.out, arguments.recipe)


def export(run: str, kind: str, out: str | None = None, recipe: str | None = None) -> None:
    """Write the file, and say how far it is from the model."""
    import torch

    from dlops_dist.engine.formats import FORMATS, SIZES
    from dlops_dist.engine.result import load
    from dlops_dist.engine.run_folder import RunFolder
    from dlops_dist.files import file_to_write

    folder = RunFolder(run)
    predictor = load(run, recipe, torch.device("cpu"))
    images, where = some_images(predictor, sum(SIZES))
    out = out or str(folder.folder / "export" / f"{folder.name}.{FORMATS[kind].suffix}")
    with file_to_write(out, "--out") as (place, name):
        content, shown = compared(kind, predictor, images, texts_of(predictor, folder.settings()[0]))
        place.write(name, lambda file: file.write(content))
    print(f"{out}: largest difference from the model on {where}: {shown}")


def compared(kind: str, predictor: Any, images: Any, texts: dict[str, str]) -> tuple[bytes, str]:
    """A file of the model, and how far it is from it.

    Raises:
        RunError: that is more than rounding explains, or the model cannot be written so.
    """
    from dlops_dist.engine.formats import FORMATS, Exported, differences

    network = Exported(predictor)
    try:
        with redirect_stderr(io.StringIO()):  # torch shows the graph of what it cannot trace
            content = FORMATS[kind].write(network, images[:2], texts)
        found = differences(FORMATS[kind].read(content, network), network, images)
    except Exception as error:  # a user's model may hold whatever torch cannot trace or write
        raise RunError(f"--format {kind}: {type(error).__name__}: {first_line(error)}") from error
    shown = ", ".join(f"{name} {d.found:.1e} (rounding explains {d.bound:.1e})" for name, d in found.items())
    if not all(d.found <= d.bound for d in found.values()):
        raise RunError(f"--format {kind}: what was written differs from the model: {shown}; another format may hold it")
    return content, shown


def texts_of(predictor: Any, task: str) -> dict[str, str]:
    """What is written beside a model."""
    inputs = predictor.learner.inputs
    values = {"classes": predictor.classes, "mean": inputs.mean, "std": inputs.std, "image_size": inputs.image_size}
    return {name: json.dumps(value) for name, value in {**values, "recipe": task}.items()}


def some_images(predictor: Any, number: int) -> tuple[Any, str]:
    """uint8 (number, H, W, 3) of the run's shards, and what to call them; random ones where the shards are gone."""
    import numpy as np
    import torch

    from dlops_dist.data.crops import opened
    from dlops_dist.data.shards import read_manifest

    shards, size = Path(predictor.learner.settings.data.shards), predictor.image_size
    try:
        split = opened(shards, read_manifest(shards), "test", predictor.learner.settings.augment)
        if split.size != size:
            raise UserError(f"data.shards: {shards} has images of another size than the run's")
        return torch.from_numpy(split.read(np.linspace(0, len(split) - 1, number).astype(int))), f"images of {shards}"
    except UserError as error:
        print(f"warning: {error}", file=sys.stderr)
        return torch.randint(0, 256, (number, *size, 3), dtype=torch.uint8), "random pixels"


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
