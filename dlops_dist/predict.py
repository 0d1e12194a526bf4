"""Classify images by the result of a run.

    python -m dlops_dist.predict runs/NAME cat.jpg dog.png
    python -m dlops_dist.predict runs/NAME FOLDER --top 5 --json

Images are read as packing reads them. Those that cannot be read are named, and the exit code is then 1. With --json a
line for each image: {"path": ..., "predictions": [{"class": ..., "probability": ...}, ...]}.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dlops_dist.errors import OneLineParser, RunError, UserError, exit_code_of
from dlops_dist.files import path_here

READ_TOGETHER = 256


def main() -> None:
    parser = OneLineParser(
        prog="python -m dlops_dist.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of the run, or its URL")
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=path_here, help="image, or folder of images")
    parser.add_argument("--top", type=int, default=1, help="how many classes of each image (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON, a line for each image")
    parser.add_argument("--recipe", help="of a run of your own recipe: its file, or its module's name")
    arguments = parser.parse_args()
    if arguments.top < 1:
        raise UserError(f"--top: {arguments.top} must be at least 1")
    paths = list(files_of(arguments.images))

    from dlops_dist.engine.result import load

    model, unread = load(arguments.run, arguments.recipe), 0
    for first in range(0, len(paths), READ_TOGETHER):
        unread += predict_files(model, paths[first : first + READ_TOGETHER], arguments.top, arguments.json)
    if unread:
        raise RunError(f"{unread} of {len(paths)} images could not be read")


def predict_files(model: Any, paths: list[Path], top: int, as_json: bool) -> int:
    """Print what some files show. Returns how many of them could not be read."""
    import torch

    images, read = [], []
    for path in paths:
        try:
            images.append(model.preprocess(path))
            read.append(path)
        except (OSError, ValueError) as error:
            print(f"warning: {path}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
    predictions = model.predict(torch.stack(images), top) if images else []
    for path, found in zip(read, predictions, strict=True):
        if as_json:
            shown = [{"class": name, "probability": probability} for name, probability in found]
            print(json.dumps({"path": str(path), "predictions": shown}))
        else:
            print(f"{path}: {', '.join(f'{name} {probability:.1%}' for name, probability in found)}")
    return len(paths) - len(read)


def files_of(places: list[Path]) -> Iterator[Path]:
    """Files that are named, and all in folders that are, sorted; hidden ones are passed over."""
    for place in places:
        if place.is_dir():
            inside = sorted(p for p in place.rglob("*") if p.is_file() and not p.name.startswith("."))
            if not inside:
                raise UserError(f"{place}: there is no file in it")
            yield from inside
        elif place.exists():
            yield place
        else:
            raise UserError(f"{place}: there is no such file")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
