"""Evaluate the result of a run: the same test figures again, or those on other shards.

The result is the checkpoint that was best on the held-out part of train, where there is one, else the last.

python -m dlops_dist.evaluate runs/NAME
python -m dlops_dist.evaluate runs/NAME --data.shards shards/other
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from dlops_dist.config import load_recipe
from dlops_dist.errors import OneLineParser, UserError, exit_code_of
from dlops_dist.files import path_here


def main() -> None:
    parser = OneLineParser(
        prog="python -m dlops_dist.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of the run, or its URL")
    parser.add_argument("--data.shards", dest="shards", type=path_here, help="other shards with as many classes")
    parser.add_argument("--recipe", help="of a run of your own recipe: its file, or its module's name")
    parser.add_argument("--split", default="test", help="which split (default: test)")
    arguments = parser.parse_args()
    figures, epoch = evaluate_run(arguments.run, arguments.shards, arguments.split, arguments.recipe)

    from dlops_dist.console import test_figures
    from dlops_dist.engine.run_folder import RunFolder

    for name, value in figures.items():
        if name == "confusion":
            print("confusion, a row for each class:", *(" ".join(f"{n:5}" for n in row) for row in value), sep="\n")
        elif isinstance(value, list):
            shown = " ".join("-" if v is None else f"{v:.2%}" for v in value)
            print(f"{name}: {shown}")
        else:
            print(f"{name}: {'-' if value is None else repr(value)}")
    row = {f"test/{name}": value for name, value in figures.items()}
    print(f"result: {RunFolder(arguments.run).name} at epoch {epoch:g}, {arguments.split}: {test_figures(row)}")


def evaluate_run(
    run: str, shards: Path | None = None, split_name: str = "test", recipe: str | None = None
) -> tuple[dict[str, Any], float]:
    """Figures of the run's result on a split, and the epoch it was taken at."""
    from dlops_dist.engine.device import default_device, memory_errors_explained, use

    device = default_device()
    use(device)
    with memory_errors_explained(device, "end what else runs there, or set CUDA_VISIBLE_DEVICES= to use the CPU"):
        return _evaluated(run, device, shards, split_name, recipe)


def _evaluated(
    run: str, device: Any, shards: Path | None, split_name: str, recipe: str | None
) -> tuple[dict[str, Any], float]:
    import numpy as np

    from dlops_dist.data.memory import keep_freed_memory
    from dlops_dist.data.shards import Split, read_manifest
    from dlops_dist.engine.evaluation import evaluate
    from dlops_dist.engine.recipe import code_of
    from dlops_dist.engine.result import result_of
    from dlops_dist.engine.run_folder import RunFolder

    keep_freed_memory()
    if recipe is not None:
        load_recipe(recipe)
    shards = shards or Path(RunFolder(run).settings()[1].data.shards)
    manifest = read_manifest(shards)
    settings, learner, state = result_of(
        run, device, lambda text: print(f"warning: {text}"), recipe, (manifest.height, manifest.width)
    )
    if len(manifest.classes) != learner.inputs.num_classes:
        raise UserError(
            f"data.shards: {shards} has {len(manifest.classes)} classes, the run has {learner.inputs.num_classes}"
        )
    split = Split(shards, manifest, split_name)
    if (split.labels < 0).any():
        raise UserError(f"--split {split_name}: {shards} has samples without a label in it")
    with_confusion = hasattr(code_of(settings), "stages")
    return evaluate(learner, split, np.arange(len(split)), with_confusion), state["epoch"]


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
