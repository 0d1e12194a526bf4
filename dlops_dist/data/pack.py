"""Sources into shards: parallel, the same bytes whoever packs, never a half-written file that looks whole."""

import hashlib
import io
import json
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dlops_dist.data.keys import key
from dlops_dist.data.order import shuffled
from dlops_dist.data.shards import FORMAT, INDEX, MANIFEST, Manifest, Shard, decode, sha256_of
from dlops_dist.data.sources import UNLABELED, Source
from dlops_dist.errors import UserError

TAR_BLOCK = 512
OWN_FILE = re.compile(r"(train|test|unlabeled)-\d{6}\.tar|\..*\.partial")
PLAN = ".packing.json"  # what is being packed; shards left by a killed packing are kept only if it is the same


class Planned(NamedTuple):
    """A shard to be written: which samples of its split, in which order."""

    number: int
    name: str
    split: str
    indices: np.ndarray


class Packed(NamedTuple):
    """A shard that was written, or found whole."""

    number: int
    shard: Shard
    keys: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: np.ndarray
    shape: tuple[int, ...]
    pixel_sums: np.ndarray
    """Exact integers (count, sum, sum of squares) x channels."""


def pack(
    source: Source,
    out: Path,
    dataset: str,
    seed: int = 0,
    shard_size: int = 5000,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write a source as shards into `out`. Each shard is a pure function of (sorted source, seed, its number).

    Args:
        shard_size: samples in each shard, at most.
        workers: packing processes; by default one for each core.
        on_progress: called with (samples done, samples in all).
    """
    plan = _plan(source, seed, shard_size)
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)
    _begin(
        out, {"dataset": dataset, "seed": seed, "shard_size": shard_size, "classes": source.classes, "format": FORMAT}
    )

    total, done = sum(len(p.indices) for p in plan), 0
    packed: list[Packed] = []
    for result in _write_all(source, out, plan, workers or os.cpu_count() or 1):
        packed.append(result)
        done += result.shard.samples
        on_progress(done, total)
    packed.sort(key=lambda p: p.number)

    manifest = _manifest(source, dataset, seed, packed, _write_index(out, packed))
    _replace(out / MANIFEST, manifest.to_bytes())
    _clear(out, keep={s.name for s in manifest.shards})
    return manifest


def _plan(source: Source, seed: int, shard_size: int) -> list[Planned]:
    plan: list[Planned] = []
    for split, listing in source.splits.items():
        _check_keys(split, listing.keys)
        order = shuffled(key(seed, 0, "packing"), len(listing.keys))
        for i, start in enumerate(range(0, len(order), shard_size)):
            name = f"{split}-{i:06d}.tar"
            plan.append(Planned(len(plan), name, split, order[start : start + shard_size]))
    if not any(planned.split == "train" for planned in plan):
        raise UserError("the source has no training images")
    return plan


def _check_keys(split: str, keys: list[str]) -> None:
    """WebDataset cuts a member's name at its first dot, and joins members of one key into one sample."""
    odd = next((k for k in keys if "." in k or not k.isprintable()), None)
    if odd is not None:
        raise UserError(f"{split} sample {odd!r}: a key must be printable and without a dot")
    if len(set(keys)) < len(keys):
        twice = next(k for k, number in Counter(keys).items() if number > 1)
        raise UserError(f"{split} sample {twice!r} occurs twice: keys must differ")


def _begin(out: Path, settings: dict[str, object]) -> None:
    """Forget what an earlier packing of something else left behind."""
    content = json.dumps(settings).encode()
    plan = out / PLAN
    if not plan.is_file() or plan.read_bytes() != content:
        _clear(out, keep=set())
    _replace(plan, content)


def _clear(out: Path, keep: set[str]) -> None:
    """Remove what an earlier packing left behind: its shards, half-written files, its plan. Never a stranger's file."""
    for path in out.iterdir():
        if path.name not in keep and (OWN_FILE.fullmatch(path.name) or path.name == PLAN):
            path.unlink()


def _write_all(source: Source, out: Path, plan: list[Planned], workers: int) -> Iterator[Packed]:
    if workers == 1 or len(plan) == 1:
        yield from (_write(source, out, shard) for shard in plan)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(plan)), spawn, _hold_source, (source,)) as pool:
        yield from pool.map(_write_in_process, repeat(out), plan)


_process_source: list[Source] = []
"""Of a packing process: opened once, its file handles serve all its shards."""


def _hold_source(source: Source) -> None:
    _process_source.append(source)


def _write_in_process(out: Path, planned: Planned) -> Packed:
    return _write(_process_source[0], out, planned)


def _write(source: Source, out: Path, planned: Planned) -> Packed:
    """One shard, under a temporary name until it was synced and read back; one that is whole is kept."""
    listing = source.splits[planned.split]
    keys, labels = [listing.keys[i] for i in planned.indices], listing.labels[planned.indices]
    tar, offsets, sizes = bytearray(), [], []
    pixel_sums, shape = np.zeros((3, 3), np.int64), None
    for sample, index, label in zip(keys, planned.indices, labels, strict=True):
        data = source.read(planned.split, int(index))
        try:
            image = decode(data, source.extension)
        except ValueError as error:
            raise UserError(f"{planned.split} sample {sample} is not a readable image ({error})") from None
        if shape is not None and image.shape != shape:
            raise UserError(
                f"{planned.split} sample {sample} is {image.shape}, others are {shape}: sizes must be equal"
            )
        shape = image.shape
        if planned.split == "train":
            pixel_sums += _pixel_sums(image)
        offsets.append(len(tar) + TAR_BLOCK)
        sizes.append(len(data))
        tar += _tar_member(f"{sample}.{source.extension}", data)
        if label != UNLABELED:
            tar += _tar_member(f"{sample}.cls", str(label).encode())
    tar += bytes(2 * TAR_BLOCK)
    sha256 = hashlib.sha256(tar).hexdigest()
    path = out / planned.name
    if not path.is_file() or sha256_of(path) != sha256:
        _replace(path, tar)
        if sha256_of(path) != sha256:
            path.unlink()
            raise UserError(f"{path} reads back otherwise than it was written: is the disk failing?")
    shard = Shard(name=planned.name, split=planned.split, samples=len(keys), bytes=len(tar), sha256=sha256)
    return Packed(planned.number, shard, keys, offsets, sizes, labels, shape or (), pixel_sums)


def _tar_member(name: str, data: bytes) -> bytes:
    """A ustar header and its content: no owner, no time, so that equal content is equal bytes."""
    encoded = name.encode()
    if len(encoded) > 100:
        raise UserError(f"sample key {name!r} is longer than the 100 bytes that a tar header holds")
    header = bytearray(TAR_BLOCK)
    header[: len(encoded)] = encoded
    header[100:108] = b"0000644\0"
    header[108:124] = b"0000000\0" * 2
    header[124:136] = b"%011o\0" % len(data)
    header[136:148] = b"0" * 11 + b"\0"
    header[148:156] = b" " * 8  # the checksum counts itself as spaces
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % TAR_BLOCK)


def _pixel_sums(image: np.ndarray) -> np.ndarray:
    pixels = image.reshape(-1, 3).astype(np.int64)
    return np.stack([np.full(3, len(pixels)), pixels.sum(axis=0), np.square(pixels).sum(axis=0)])


def _write_index(out: Path, packed: list[Packed]) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({
        "key": [k for p in packed for k in p.keys],
        "shard": pa.array(np.repeat([p.number for p in packed], [len(p.keys) for p in packed]), pa.int32()),
        "offset": pa.array([o for p in packed for o in p.offsets], pa.int64()),
        "size": pa.array([s for p in packed for s in p.sizes], pa.int32()),
        "label": pa.array(np.concatenate([p.labels for p in packed]), pa.int32()),
    })  # fmt: skip
    file = io.BytesIO()
    pq.write_table(table, file)
    _replace(out / INDEX, file.getvalue())
    return hashlib.sha256(file.getvalue()).hexdigest()


def _manifest(source: Source, dataset: str, seed: int, packed: list[Packed], index_sha256: str) -> Manifest:
    shape = packed[0].shape
    for p in packed:
        if p.shape != shape:
            raise UserError(f"{p.shard.split} sample {p.keys[0]} is {p.shape}, others are {shape}: sizes must be equal")
    height, width, _ = shape
    count, total, squares = np.sum([p.pixel_sums for p in packed], axis=0).astype(object)  # python integers: exact
    mean = [float(t / n / 255) for n, t in zip(count, total, strict=True)]
    variance = ((s / n / 255**2 - m * m) for n, s, m in zip(count, squares, mean, strict=True))
    std = [max(v, 1e-8) ** 0.5 for v in variance]
    splits: dict[str, int] = {}
    for p in packed:
        splits[p.shard.split] = splits.get(p.shard.split, 0) + p.shard.samples
    return Manifest(
        dataset=dataset, seed=seed, extension=source.extension, height=height, width=width,
        mean=tuple(mean), std=tuple(std), classes=source.classes, splits=splits,
        shards=[p.shard for p in packed], index_sha256=index_sha256,
    )  # fmt: skip


def _replace(path: Path, content: bytes | bytearray) -> None:
    """Write under a temporary name, sync, rename: the name never stands for half of the content."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
