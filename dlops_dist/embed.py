"""Write the embeddings of shards by the result of a run: a Parquet file with a row for each sample, in their order.

    python -m dlops_dist.embed runs/NAME SHARDS --out FILE.parquet                       in one process
    python -m dlops_dist.embed runs/NAME SHARDS --out FILE.parquet --workers 4           on Ray
    python -m dlops_dist.embed runs/NAME SHARDS --out FILE.parquet --split train test    not the unlabeled ones

Columns: split, key, label and class (null where a sample has none), embedding (float32, of fixed size). Blocks of 256
samples are computed whole, as evaluation does it, so that any number of workers writes the same bytes.
"""

import argparse
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from dlops_dist.errors import OneLineParser, UserError, exit_code_of
from dlops_dist.files import is_url, path_here


def main() -> None:
    parser = OneLineParser(
        prog="python -m dlops_dist.embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of the run, or its URL")
    parser.add_argument("shards", type=path_here, help="folder of shards")
    parser.add_argument("--out", required=True, metavar="FILE", help="Parquet file to write, or its URL")
    parser.add_argument("--split", nargs="+", metavar="SPLIT", help="which splits (default: all)")
    parser.add_argument("--workers", type=int, help="so many, on Ray (default: this process alone)")
    parser.add_argument("--recipe", help="of a run of your own recipe: its file, or its module's name")
    arguments = parser.parse_args()
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers: {arguments.workers} must be at least 1")
    number = embed(**vars(arguments))
    print(f"{arguments.out}: embeddings of {number:,} samples")


def embed(
    run: str, shards: Path, out: str, split: Sequence[str] | None = None, workers: int | None = None,
    recipe: str | None = None,
) -> int:  # fmt: skip
    """Write the file, whole or not at all. Returns its number of rows."""
    import torch

    from dlops_dist.data.memory import keep_freed_memory
    from dlops_dist.data.shards import Split, read_manifest
    from dlops_dist.engine.device import default_device, memory_errors_explained, use
    from dlops_dist.engine.embedding import ADVICE, embeddings_of, parts_of, write_rows
    from dlops_dist.engine.result import load
    from dlops_dist.files import file_to_write

    keep_freed_memory()
    device = default_device() if workers is None else torch.device("cpu")
    use(device)
    manifest = read_manifest(shards)
    with memory_errors_explained(device, ADVICE):
        model = load(run, recipe, device)
        if (size := (manifest.height, manifest.width)) != model.image_size:
            ours, theirs = ("x".join(map(str, pixels)) for pixels in (model.image_size, size))
            raise UserError(f"{shards}: its images are {theirs}, {run} was trained on {ours}; pack them at that size")
        splits = {name: Split(shards, manifest, name) for name in split or manifest.splits}
        parts = list(parts_of(splits))
        if workers is None:
            found = (embeddings_of(model, splits[part.split], part.ids) for part in parts)
        else:
            found = on_ray(run, shards, parts, workers)
        rows, dimension = zip(parts, found, strict=True), model.learner.model.embedding_dim
        with file_to_write(out, "--out") as (folder, name), closing(found):
            folder.write(name, lambda file: write_rows(file, splits, rows, dimension))
    return sum(map(len, splits.values()))


def on_ray(run: str, shards: Path, parts: Sequence[Any], workers: int) -> Generator[Any]:
    """The embeddings of each part, by workers that load the run for themselves."""
    from dlops_dist.config import load_recipe
    from dlops_dist.engine.embedding import Job, computed_by_worker
    from dlops_dist.engine.run_folder import RunFolder
    from dlops_dist.ray_backend import map_on_ray

    run = run if is_url(run) else str(Path(run).absolute())
    task, _ = RunFolder(run).settings()
    job = Job(run, task, load_recipe(task).source, shards.absolute())
    return map_on_ray(computed_by_worker, job, parts, workers, str(job.shards), run, print)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
