"""A folder of packed shards: its manifest, its index, and random access to the images.

OUT/train-000000.tar ...   WebDataset tars: <key>.jpg or <key>.npy, then <key>.cls
OUT/index.parquet          of each sample, in the order of the shards: key, shard, offset, size, crc32, label, folds
OUT/manifest.json          classes, counts, sha256 of each file; written last: its presence means complete
"""

import errno
import hashlib
import json
import os
import re
import resource
import zlib
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dlops_dist.data.images import MAX_PIXELS, decode
from dlops_dist.data.index import INDEX, Expected, keys_at, read_index
from dlops_dist.errors import UserError

FORMAT = 2
MANIFEST = "manifest.json"
PLAN = ".packing.json"
"""What is being packed, in a folder that is not complete."""
SHARD_NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]*\.tar$"
REMOTE = re.compile(r"(pipe:|[a-z][a-z0-9+.-]*://)", re.IGNORECASE)


Finite = Annotated[float, Field(allow_inf_nan=False)]
Packing = dict[str, bool | int | float | None]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Shard(BaseModel):
    """One tar file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=SHARD_NAME)
    split: str
    samples: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str


class Manifest(BaseModel):
    """What a folder of shards holds. Free of times, hosts and paths: equal data gives equal bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int = FORMAT
    dataset: str
    packing: Packing = {}
    """What the packing was asked for: seed, shard_size, classes, limit, size. Empty for shards that others wrote."""
    skipped: dict[str, str] = {}
    """{image: why it was left out}."""
    extension: Literal["jpg", "npy"]
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    mean: tuple[Finite, Finite, Finite]
    """Of the train split's pixels, as parts of 255."""
    std: tuple[Positive, Positive, Positive]
    classes: list[str]
    num_folds: int = Field(0, ge=0, le=31)
    """Of the train split, which may overlap; 0 where the dataset defines none."""
    splits: dict[str, int]
    """Number of samples in each."""
    shards: list[Shard]
    index_sha256: str

    @model_validator(mode="after")
    def _adds_up(self) -> "Manifest":
        counts = dict.fromkeys(self.splits, 0)
        for shard in self.shards:
            counts[shard.split] = counts.get(shard.split, 0) + shard.samples
        if counts != self.splits:
            raise ValueError(f"the shards hold {counts}, the splits say {self.splits}")
        if self.height * self.width > MAX_PIXELS:
            raise ValueError(f"images of {self.height} x {self.width} are refused")
        return self

    def to_bytes(self) -> bytes:
        left_out = set() if self.skipped else {"skipped"}  # as earlier versions wrote it
        return (json.dumps(self.model_dump(exclude=left_out), indent=1) + "\n").encode()

    @property
    def way_out(self) -> str:
        """Of a file that is not what the manifest says."""
        if self.packing:
            return "pack the shards again"
        return "bring back the file as it was, or write the index anew by python -m dlops_dist.shard index"

    @property
    def of_index(self) -> Expected:
        """What it says of the index."""
        samples, sizes = (tuple(getattr(shard, name) for shard in self.shards) for name in ("samples", "bytes"))
        return Expected(self.index_sha256, samples, sizes, len(self.classes), self.num_folds, self.way_out)

    @property
    def id(self) -> str:
        """The dataset's identity: what checkpoints and runs refer to."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete folder of shards."""
    path = folder / MANIFEST
    if not os.access(folder, os.X_OK) and folder.is_dir():
        raise UserError(f"data.shards: {folder}: permission denied")
    if not path.is_file():
        what = "no such folder" if not folder.is_dir() else f"no {MANIFEST} in it: not packed, or not to the end"
        name = folder.name if folder.name in ("tiny-imagenet", "stl10", "shapes") else "DATASET"
        way_out = f"make them with 'python -m dlops_dist.shard {name} --out {folder.parent}'"
        if any(folder.glob("*.tar")) and not (folder / PLAN).exists():
            what = f"no {MANIFEST} beside its shards"
            way_out = f"write it by 'python -m dlops_dist.shard index {folder}'"
        raise UserError(f"data.shards: {folder}: {what}; {way_out}")
    try:
        values = json.loads(path.read_bytes())
        if values["format"] != FORMAT:
            raise UserError(
                f"{path} has format {values['format']}, this version reads {FORMAT}; pack the shards --again"
            )
        return Manifest(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        why = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}".removeprefix(": ")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
    raise UserError(f"{path} is damaged ({why}); pack the shards --again")


class Split:
    """The samples of one split: sample id i is the i-th row of the index that belongs to the split."""

    in_memory = False

    def __init__(self, folder: Path, manifest: Manifest, name: str) -> None:
        if name not in manifest.splits:
            raise UserError(f"{folder} has no split {name!r}, only {', '.join(manifest.splits)}")
        self.name, self.manifest, self._folder = name, manifest, folder
        self._shards = np.array([i for i, shard in enumerate(manifest.shards) if shard.split == name], np.int64)
        samples = np.array([shard.samples for shard in manifest.shards], np.int64)
        self._ends = np.cumsum(samples[self._shards])
        self._rows = rows = _rows_of(np.cumsum(samples)[self._shards], samples[self._shards])
        columns = read_index(folder / INDEX, manifest.of_index)
        self._offsets, self._sizes, self._checksums = (columns[c][rows] for c in ("offset", "size", "crc32"))
        self.labels, self.folds = columns["label"][rows], columns["folds"][rows]
        """(N,), UNLABELED where there is none; and (N,): bit f is set where the sample belongs to fold f."""
        self._files: dict[int, FileIO] = {}
        self._opening = Lock()

    def __len__(self) -> int:
        return len(self.labels)

    def _file(self, number: int) -> FileIO:
        """A shard, opened when it is first read, whichever thread comes first."""
        file = self._files.get(number)
        if file is not None:
            return file
        shard = self.manifest.shards[number]
        path = self._folder / shard.name
        with self._opening:
            if number not in self._files:
                if not path.is_file() or path.stat().st_size != shard.bytes:
                    way_out = self.manifest.way_out
                    raise UserError(f"{path} is missing or not {shard.bytes} bytes long; {way_out}")
                self._files[number] = _open(path)
            return self._files[number]

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Images of the samples, uint8 (N, height, width, 3), RGB.

        Raises:
            UserError: a sample is damaged; names its file and key.
        """
        manifest, images = self.manifest, np.empty((len(ids), self.manifest.height, self.manifest.width, 3), np.uint8)
        shards = self._shards[np.searchsorted(self._ends, ids, side="right")]
        where = (shards, self._offsets[ids], self._sizes[ids], self._checksums[ids])
        rows = zip(*(column.tolist() for column in where), strict=True)
        for place, (shard, offset, size, checksum) in enumerate(rows):
            try:
                data = os.pread(self._file(shard).fileno(), size, offset)  # a map of a file cut off is a bus error
                if zlib.crc32(data) != checksum:
                    raise ValueError("not the bytes that were packed")
                decode(data, manifest.extension, images[place])
            except ValueError as error:
                path, (key,) = self._folder / manifest.shards[shard].name, self.keys_of(ids[place : place + 1])
                raise UserError(f"{path}: {key}: {error}; {manifest.way_out}") from None
        return images

    def keys_of(self, ids: np.ndarray) -> list[str]:
        """The samples' names, which are read when they are wanted, and a part of them at a time."""
        rows = self._rows.start + ids if isinstance(self._rows, slice) else self._rows[ids]
        return keys_at(self._folder / INDEX, self.manifest.of_index, rows)


def _rows_of(ends: np.ndarray, samples: np.ndarray) -> np.ndarray | slice:
    """Of the index, those of a split's shards; where they adjoin, as in all that we pack, splits share its memory."""
    starts = ends - samples
    if np.array_equal(starts[1:], ends[:-1]):
        return slice(int(starts[0]), int(ends[-1])) if len(ends) else slice(0, 0)
    return np.concatenate([np.arange(*span) for span in zip(starts, ends, strict=True)])


def _open(path: Path) -> FileIO:
    """Takes as many descriptors as the system grants where the usual thousand are gone: one for each shard."""
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return path.open("rb", buffering=0)
