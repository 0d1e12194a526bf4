"""A folder of packed shards: its manifest, its index, and random access to the images.

OUT/train-000000.tar ...   WebDataset tars: <key>.jpg or <key>.npy, then <key>.cls
OUT/index.parquet          key, shard, offset, size, label of each sample, in the order of the shards
OUT/manifest.json          classes, counts, sha256 of each file; written last: its presence means complete
"""

import hashlib
import io
import json
import mmap
import os
from functools import cached_property
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from dlops_dist.errors import UserError

FORMAT = 1
MANIFEST, INDEX = "manifest.json", "index.parquet"


class Shard(BaseModel):
    """One tar file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    split: str
    samples: int
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a folder of shards holds. Free of times, hosts and paths: equal data gives equal bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int = FORMAT
    dataset: str
    seed: int
    extension: str
    height: int
    width: int
    mean: tuple[float, ...]
    """Of the train split's pixels, as parts of 255."""
    std: tuple[float, ...]
    classes: list[str]
    splits: dict[str, int]
    """Number of samples in each."""
    shards: list[Shard]
    index_sha256: str

    def to_bytes(self) -> bytes:
        return (json.dumps(self.model_dump(), indent=1) + "\n").encode()

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
        command = f"python launch/shard.py {name} --out {folder.parent}"
        raise UserError(f"data.shards: {folder}: {what}; make them with '{command}'")
    try:
        values = json.loads(path.read_bytes())
        if values["format"] != FORMAT:
            raise UserError(f"{path} has format {values['format']}, this version reads {FORMAT}; pack the shards again")
        return Manifest(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        why = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    except (ValueError, TypeError, KeyError) as error:
        why = f"{type(error).__name__}: {error}"
    raise UserError(f"{path} is damaged ({why}); pack the shards again")


class Split:
    """The samples of one split: sample id i is the i-th row of the index that belongs to the split."""

    def __init__(self, folder: Path, manifest: Manifest, name: str) -> None:
        if name not in manifest.splits:
            raise UserError(f"{folder} has no split {name!r}, only {', '.join(manifest.splits)}")
        self.name, self._folder, self._manifest = name, folder, manifest
        table = _read_index(folder, manifest)
        rows = np.isin(table["shard"], [i for i, shard in enumerate(manifest.shards) if shard.split == name])
        self._shards, self._offsets, self._sizes = (table[c][rows] for c in ("shard", "offset", "size"))
        self._keys = table["key"][rows]
        self.labels = table["label"][rows].astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def _maps(self) -> dict[int, mmap.mmap]:
        maps = {}
        for i in np.unique(self._shards):
            shard = self._manifest.shards[i]
            path = self._folder / shard.name
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise UserError(f"{path} is missing or not {shard.bytes} bytes long; pack the shards again")
            with path.open("rb") as file:
                maps[i] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return maps

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Images of the samples, uint8 (N, height, width, 3), RGB."""
        images = np.empty((len(ids), self._manifest.height, self._manifest.width, 3), np.uint8)
        for image, i in zip(images, ids, strict=True):
            start = self._offsets[i]
            data = self._maps[self._shards[i]][start : start + self._sizes[i]]
            try:
                decode(data, self._manifest.extension, image)
            except ValueError as error:
                shard = self._manifest.shards[self._shards[i]].name
                raise UserError(f"{self._folder / shard}: {self._keys[i]}: {error}; pack the shards again") from None
        return images


def decode(data: bytes, extension: str, out: np.ndarray | None = None) -> np.ndarray:
    """One image, uint8 (height, width, 3), RGB; into `out` where given. ValueError for anything else."""
    if extension == "jpg":
        import simplejpeg

        image = simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=out)
    else:
        image = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"{image.dtype} {image.shape} is not an uint8 RGB image")
    if out is None:
        return image
    if image.shape != out.shape:
        raise ValueError(f"the image is {image.shape}, the manifest says {out.shape}")
    if extension != "jpg":
        out[:] = image
    return out


def _read_index(folder: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    import pyarrow.parquet as pq

    path = folder / INDEX
    if not path.is_file() or sha256_of(path) != manifest.index_sha256:
        raise UserError(f"{path} is missing or does not match {MANIFEST}; pack the shards again")
    table = pq.read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
