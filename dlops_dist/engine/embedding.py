"""Embeddings of shards by a trained model: blocks of samples, computed here or by workers, and the file of them all."""

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from dlops_dist.config import recipe_from_source
from dlops_dist.data.memory import keep_freed_memory
from dlops_dist.data.order import Ids, blocks
from dlops_dist.data.shards import Split, read_manifest
from dlops_dist.engine.device import default_device, memory_errors_explained, use
from dlops_dist.engine.evaluation import BLOCK, read_blocks
from dlops_dist.engine.result import Predictor, load

ADVICE = "end what else runs there, or set CUDA_VISIBLE_DEVICES= to use the CPU"
BLOCKS = 4
"""That a worker takes at once: a row group of the file."""


class Part(NamedTuple):
    """Some samples of a split, of whole blocks."""

    split: str
    ids: Ids


class Job(NamedTuple):
    """What a worker needs to know."""

    run: str
    task: str
    source: bytes
    """Of the recipe."""
    shards: Path


def parts_of(splits: Mapping[str, Split]) -> Iterator[Part]:
    for name, split in splits.items():
        for ids in blocks(np.arange(len(split)), BLOCK * BLOCKS):
            yield Part(name, ids)


def embeddings_of(model: Predictor, split: Split, ids: Ids) -> np.ndarray:
    """float32 (n, D), a block of 256 samples at a time."""
    batches = list(read_blocks(model.learner, split, blocks(ids, BLOCK)))
    found = model.learner.lanes.map(lambda _, batch: model.embed(batch.images).float(), batches)
    return np.concatenate([embeddings.cpu().numpy() for embeddings in found])


def computed_by_worker(job: Job, part: Part) -> np.ndarray:
    """The embeddings of a part, in a process of its own."""
    device = default_device()
    use(device)
    with memory_errors_explained(device, ADVICE):
        model, splits = _opened(job)
        return embeddings_of(model, splits[part.split], part.ids)


@lru_cache(maxsize=1)
def _opened(job: Job) -> tuple[Predictor, dict[str, Split]]:
    """Once for all parts of a worker."""
    keep_freed_memory()
    recipe_from_source(job.task, job.source)
    manifest = read_manifest(job.shards)
    return load(job.run), {name: Split(job.shards, manifest, name) for name in manifest.splits}


def write_rows(
    file: BinaryIO, splits: Mapping[str, Split], found: Iterable[tuple[Part, np.ndarray]], dimension: int
) -> None:
    """A Parquet file of embeddings (n, D), and of what else is known of their samples."""
    types = [pa.string(), pa.string(), pa.int32(), pa.string(), pa.list_(pa.float32(), dimension)]
    schema = pa.schema(list(zip(("split", "key", "label", "class", "embedding"), types, strict=True)))
    with parquet.ParquetWriter(file, schema) as writer:
        for (name, ids), embeddings in found:
            split = splits[name]
            labels = [label if label >= 0 else None for label in split.labels[ids].tolist()]
            classes = [None if label is None else split.manifest.classes[label] for label in labels]
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), dimension)
            columns = [[name] * len(ids), split.keys_of(ids), labels, classes, vectors]
            writer.write_table(pa.table(columns, schema=schema))
