"""What is found out about each shard as it is written or read, and the index and manifest that are made of it."""

import hashlib
import io
import zlib
from collections import Counter
from collections.abc import Callable
from itertools import chain
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from dlops_dist.data.index import COLUMNS, INDEX
from dlops_dist.data.shards import MANIFEST, Manifest, Packing, Shard
from dlops_dist.errors import UserError
from dlops_dist.files import write_file

SPLITS = ("train", "test", "unlabeled")


class Facts(BaseModel):
    """One shard's part of the index, and what its pixels add to mean and deviation: collected sample by sample."""

    model_config = ConfigDict(extra="forbid")
    name: str
    split: str
    num_bytes: int = 0
    sha256: str = ""
    shape: tuple[int, ...] = ()
    """(height, width, 3) of each image."""
    pixel_sums: list[list[int]] = [[0] * 3] * 3
    """(3, 3) exact integers, count, sum and sum of squares by channel, of a training shard; zeros for others."""
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS if name != "shard"}
    bad: dict[str, str] = {}
    """{name: why} of the images that could not be read."""
    changed: dict[str, int] = {}
    """How many images had to be changed, by what was done to them."""

    @property
    def shard(self) -> Shard:
        samples = len(self.columns["key"])
        return Shard(name=self.name, split=self.split, samples=samples, bytes=self.num_bytes, sha256=self.sha256)

    def add(self, key: str, offset: int, data: bytes, image: np.ndarray, label: int, folds: int) -> None:
        """Raises ValueError for an image of another size than those before it."""
        self.shape = self.shape or image.shape
        if image.shape != self.shape:
            raise ValueError(_other_size(image.shape, self.shape))
        if self.split == "train":
            rows = image.reshape(len(image), -1)  # summed row by row: seven times faster than by pixel
            squares = np.square(rows, dtype=np.uint16)
            totals = [values.sum(axis=0, dtype=np.uint64).reshape(-1, 3).sum(axis=0) for values in (rows, squares)]
            own = [[image.size // 3] * 3, *(total.tolist() for total in totals)]
            self.pixel_sums = [list(map(add, *both)) for both in zip(self.pixel_sums, own, strict=True)]
        row = (key, offset, len(data), zlib.crc32(data), label, folds)
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)


def refuse_other_size(facts: list[Facts], name: Callable[[Facts], str]) -> None:
    """Of the last shard, against the first one with an image in it; `name` tells where a shard's first image lies."""
    last, first = facts[-1], next((f for f in facts if f.shape), facts[-1])
    if last.shape not in ((), first.shape):
        raise UserError(f"{name(last)}: {_other_size(last.shape, first.shape)}")


def _other_size(shape: tuple[int, ...], first: tuple[int, ...]) -> str:
    way_out = "sizes must be equal; images that are packed from files become so by --size"
    return f"it is {shape}, others are {first}: {way_out}"


def write_index_and_manifest(
    out: Path,
    dataset: str,
    packing: Packing,
    extension: str,
    classes: list[str],
    facts: list[Facts],
    skipped: dict[str, str] | None = None,
) -> Manifest:
    """Both files of a folder whose shards are there, the manifest last. `facts` in the order of the shards."""
    facts = [f for f in facts if f.shape]
    height, width, _ = facts[0].shape
    mean, std = _mean_and_std(facts)
    shards = [f.shard for f in facts]
    counts = Counter[str]()
    for shard in shards:
        counts[shard.split] += shard.samples
    manifest = Manifest(
        dataset=dataset, packing=packing, extension=extension,  # type: ignore[arg-type]
        height=height, width=width, mean=mean, std=std, classes=classes,
        splits={name: counts[name] for name in SPLITS if counts[name]},
        num_folds=max(max(f.columns["folds"]) for f in facts).bit_length(), shards=shards, skipped=skipped or {},
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

    columns: dict[str, Any] = {"shard": np.repeat(np.arange(len(facts)), [len(f.columns["key"]) for f in facts])}
    columns |= {name: list(chain.from_iterable(f.columns[name] for f in facts)) for name in facts[0].columns}
    types = {name: pa.string() if kind == "O" else pa.from_numpy_dtype(kind) for name, kind in COLUMNS.items()}
    content = io.BytesIO()
    pq.write_table(pa.table({name: pa.array(columns[name], type=kind) for name, kind in types.items()}), content)
    write_file(out / INDEX, lambda file: file.write(content.getvalue()))
    return hashlib.sha256(content.getvalue()).hexdigest()
