"""The index of a folder of shards: where each sample lies, and what it is.

A process holds 20 bytes a sample; names stay on the disk until they are wanted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dlops_dist.errors import UserError, first_line
from dlops_dist.files import sha256_of

INDEX = "index.parquet"
COLUMNS = {"key": "O", "shard": "i4", "offset": "i8", "size": "i4", "crc32": "u4", "label": "i4", "folds": "i4"}
HELD = ("offset", "size", "crc32", "label")
"""What a process holds; a sample's shard follows from its place, folds are rare."""
UNLABELED = -1
PART = 2**18
"""Rows that are read at a time."""
OTHER_NUMBERS = "other numbers of samples than in the manifest"


class Expected(NamedTuple):
    """What the manifest says of an index."""

    sha256: str
    samples: tuple[int, ...]
    """Of each shard; so are bytes."""
    bytes: tuple[int, ...]
    num_classes: int
    num_folds: int
    way_out: str
    """Of an index that is another."""


def read_index(path: Path, expected: Expected) -> dict[str, np.ndarray]:
    """The columns of an index that are numbers, checked; once in a process, for all splits that are read of it."""
    with _errors_named(path, expected):
        status = path.stat() if path.is_file() else None
        if status is None:
            raise _other(path, expected)
        return _columns(path, expected, (status.st_ino, status.st_size, status.st_mtime_ns))


def keys_at(path: Path, expected: Expected, rows: np.ndarray) -> list[str]:
    """The samples' names in some rows."""
    with _errors_named(path, expected):
        ends, found = _ends_of_groups(path, expected.sha256), []
        for row, group in zip(rows.tolist(), np.searchsorted(ends, rows, side="right").tolist(), strict=True):
            keys = _keys_of_group(path, expected.sha256, group)
            found.append(keys[len(keys) + row - int(ends[group])].as_py())
        return found


@contextmanager
def _errors_named(path: Path, expected: Expected) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); {expected.way_out}") from None


def _other(path: Path, expected: Expected) -> UserError:
    return UserError(f"{path} is missing or does not match manifest.json; {expected.way_out}")


@lru_cache(maxsize=1)
def _columns(path: Path, expected: Expected, _status: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Read a part at a time. Raises ValueError: says what cannot be true of the shards."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if sha256_of(path) != expected.sha256:
        raise _other(path, expected)
    file, number, begin, last = pq.ParquetFile(path), sum(expected.samples), 0, 0
    key_type = file.schema_arrow.field("key").type
    if not (pa.types.is_string(key_type) or pa.types.is_large_string(key_type)):
        raise ValueError("keys that are no text")
    if file.metadata.num_rows != number:
        raise ValueError(OTHER_NUMBERS)
    held = (*HELD, "folds") if expected.num_folds else HELD
    columns = {name: np.empty(number, COLUMNS[name]) for name in held}
    counts = np.zeros(len(expected.samples), np.int64)
    for batch in file.iter_batches(PART, columns=[name for name in COLUMNS if name != "key"]):
        part = {name: batch[name].to_numpy(zero_copy_only=False) for name in batch.schema.names}
        if (problem := _problem(part, expected, last)) is not None:
            raise ValueError(problem)
        counts += np.bincount(part["shard"], minlength=len(counts))
        end = begin + len(batch)
        for name, column in columns.items():
            column[begin:end] = part[name]
        begin, last = end, int(part["shard"][-1])
    if counts.tolist() != list(expected.samples):
        raise ValueError(OTHER_NUMBERS)
    pa.default_memory_pool().release_unused()
    return {"folds": np.broadcast_to(np.int32(0), number), **columns}


def _problem(part: dict[str, np.ndarray], expected: Expected, last: int) -> str | None:
    """What in a part of an index cannot be true; the row before it is of the `last` shard."""
    for name, column in part.items():
        if column.dtype != np.dtype(COLUMNS[name]):
            return f"{name} is {column.dtype}"
    shards, offsets, sizes, labels = (part[name] for name in ("shard", "offset", "size", "label"))
    if not 0 <= shards.min() <= shards.max() < len(expected.samples):
        return "shards that are not in the manifest"
    if shards[0] < last or (shards[1:] < shards[:-1]).any():
        return "samples that are not in the order of the shards"
    ends = np.array(expected.bytes, np.int64)[shards]
    if (offsets < 0).any() or (sizes < 0).any() or (offsets > ends - sizes).any():
        return "samples outside of their shards"
    if ((labels < UNLABELED) | (labels >= expected.num_classes)).any():
        return "labels without a class"
    if ((part["folds"] < 0) | (part["folds"] >= 1 << expected.num_folds)).any():
        return "folds that are not in the manifest"
    return None


@lru_cache(maxsize=1)
def _ends_of_groups(path: Path, _sha256: str) -> np.ndarray:
    """How many rows there are up to the end of each group of the file."""
    import pyarrow.parquet as pq

    metadata = pq.ParquetFile(path).metadata
    return np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])


@lru_cache(maxsize=2)
def _keys_of_group(path: Path, _sha256: str, group: int) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read_row_group(group, columns=["key"]).column(0)
