"""What is found out about each shard as it is written or read, and the index and manifest that are made of it."""

import hashlib
import io
import zlib
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dlops_dist.data.shards import COLUMNS, INDEX, MANIFEST, Manifest, Packing, Shard
from dlops_dist.errors import UserError
from dlops_dist.files import write_file

SPLITS = ("train", "test", "unlabeled")
EQUAL_SIZES = "sizes must be equal; images that are packed from files become so by --size"


class Facts(NamedTuple):
    """One shard's part of the index, and what its pixels add to mean and deviation."""

    shard: Shard
    shape: tuple[int, ...]
    """(height, width, 3) of each image."""
    pixel_sums: list[list[int]]
    """(3, 3) exact integers, count, sum and sum of squares by channel, of a training shard; zeros for others."""
    columns: dict[str, list]
    """key, offset, size, crc32, label, folds of each sample."""
    bad: dict[str, str]
    """{name: why} of the images that could not be read."""
    changed: dict[str, int]
    """How many images had to be changed, by what was done to them."""


class FactsOfSamples:
    """Collects a shard's facts, sample by sample."""

    def __init__(self, split: str) -> None:
        self.shape: tuple[int, ...] = ()
        self.bad: dict[str, str] = {}
        self.changed = Counter[str]()
        self._split = split
        self._sums = np.zeros((3, 3), np.int64)
        self._columns: dict[str, list] = {name: [] for name in COLUMNS if name != "shard"}

    def add(self, key: str, offset: int, data: bytes, image: np.ndarray, label: int, folds: int) -> None:
        """Raises ValueError for an image of another size than those before it."""
        if self.shape not in ((), image.shape):
            raise ValueError(f"it is {image.shape}, others are {self.shape}: {EQUAL_SIZES}")
        self.shape = image.shape
        if self._split == "train":
            rows = image.reshape(len(image), -1)  # summed row by row: seven times faster than by pixel
            squares = np.square(rows, dtype=np.uint16)
            totals = [values.sum(axis=0, dtype=np.uint64).reshape(-1, 3).sum(axis=0) for values in (rows, squares)]
            self._sums += np.array([[image.size // 3] * 3, *totals], np.int64)
        row = (key, offset, len(data), zlib.crc32(data), label, folds)
        for column, value in zip(self._columns.values(), row, strict=True):
            column.append(value)

    def done(self, name: str, num_bytes: int, sha256: str) -> Facts:
        number = len(self._columns["key"])
        shard = Shard(name=name, split=self._split, samples=number, bytes=num_bytes, sha256=sha256)
        return Facts(shard, self.shape, self._sums.tolist(), self._columns, self.bad, self.changed)


def write_index_and_manifest(
    out: Path,
    dataset: str,
    packing: Packing,
    extension: str,
    classes: list[str],
    facts: list[Facts],
    skipped: dict[str, str] | None = None,
) -> Manifest:
    """Both files of a folder whose shards are there, the manifest last. `facts` in the order of the shards.

    Raises:
        UserError: images of different sizes.
    """
    facts = [f for f in facts if f.shard.samples]
    height, width, _ = facts[0].shape
    for f in facts:
        if f.shape != facts[0].shape:
            where = f"{out / f.shard.name}: {f.columns['key'][0]}"
            raise UserError(f"{where}: it is {f.shape}, others are {facts[0].shape}: {EQUAL_SIZES}")
    mean, std = _mean_and_std(facts)
    folds = chain.from_iterable(f.columns["folds"] for f in facts)
    counts = Counter[str]()
    for f in facts:
        counts[f.shard.split] += f.shard.samples
    splits = {name: counts[name] for name in SPLITS if counts[name]}
    manifest = Manifest(
        dataset=dataset, packing=packing, extension=extension,  # type: ignore[arg-type]
        height=height, width=width, mean=mean, std=std, classes=classes, splits=splits,
        num_folds=max(folds).bit_length(), shards=[f.shard for f in facts], skipped=skipped or {},
        index_sha256=_write_index(out, facts),
    )  # fmt: skip
    write_file(out / MANIFEST, lambda file: file.write(manifest.to_bytes()))
    return manifest


def _mean_and_std(facts: list[Facts]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of the training pixels, as parts of 255; exact up to the last division."""
    count, total, squares = np.sum([np.array(f.pixel_sums, object) for f in facts], axis=0)  # python integers
    mean = tuple(float(t / n / 255) for n, t in zip(count, total, strict=True))
    variance = ((s / n / 255**2 - m * m) for n, s, m in zip(count, squares, mean, strict=True))
    return mean, tuple(max(v, 1e-8) ** 0.5 for v in variance)


def _write_index(out: Path, facts: list[Facts]) -> str:
    """Returns its sha256."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {"shard": np.repeat(np.arange(len(facts)), [f.shard.samples for f in facts])}
    columns |= {name: list(chain.from_iterable(f.columns[name] for f in facts)) for name in facts[0].columns}
    types = {name: pa.string() if kind == "O" else pa.from_numpy_dtype(kind) for name, kind in COLUMNS.items()}
    content = io.BytesIO()
    pq.write_table(pa.table({name: pa.array(columns[name], type=kind) for name, kind in types.items()}), content)
    write_file(out / INDEX, lambda file: file.write(content.getvalue()))
    return hashlib.sha256(content.getvalue()).hexdigest()
