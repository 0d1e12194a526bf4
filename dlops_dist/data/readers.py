"""Three ways to read images, all of the same bits: decode them, map decoded ones, or keep them on the device.

decode   each image from its shard, whenever it is wanted: `Split` itself
decoded  from a file of raw pixels that all workers of a node map into memory: one process makes it while the others
         wait, it gets its name when it is whole, and one process compares its hash each time the node was started
device   from a tensor on the GPU that holds all of them
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, Protocol

import numpy as np
import psutil
import torch
from torch import Tensor

from dlops_dist.data.memory import available_memory
from dlops_dist.data.shards import Split
from dlops_dist.files import locked, sha256_of, temporary_folder, write_file

Kind = Literal["auto", "decode", "decoded", "device"]
LARGEST_PART = 4
"""auto: pixels may fill a quarter of a GPU's free memory, or of a container's memory and of the disk's free space."""
LOADED_AT_ONCE = 4096
BLOCK = 512
"""Images that a thread decodes at a time."""
TELL_EVERY_S = 5.0


class Reader(Protocol):
    """The images and labels of a split."""

    labels: np.ndarray
    """(N,), int32 of shards."""
    in_memory: bool
    """Whether nothing is waited for, and nothing computed, to read."""

    def __len__(self) -> int: ...

    def read(self, ids: np.ndarray) -> np.ndarray | Tensor:
        """uint8 (n, height, width, 3), RGB."""
        ...


class DecodedReader:
    """Reads from all the pixels of a split, in a map, whose pages may have to come from the disk."""

    in_memory = False

    def __init__(self, split: Split, pixels: np.ndarray) -> None:
        self.labels, self.pixels = split.labels, np.asarray(pixels)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, ids: np.ndarray) -> np.ndarray:
        return self.pixels.take(ids, axis=0)


class DeviceReader:
    """Holds all the pixels of a split on a device."""

    in_memory = True

    def __init__(self, source: Reader, device: torch.device) -> None:
        self.labels = source.labels
        one = torch.as_tensor(source.read(np.arange(len(source))[:1]))
        self._pixels = torch.empty(len(source), *one.shape[1:], dtype=one.dtype, device=device)
        for start in range(0, len(source), LOADED_AT_ONCE):
            ids = np.arange(start, min(start + LOADED_AT_ONCE, len(source)))
            self._pixels[start : start + len(ids)] = torch.as_tensor(source.read(ids))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, ids: np.ndarray) -> Tensor:
        return self._pixels[on_device(ids, self._pixels.device)]


class Joined:
    """The samples of the first reader, then those of the next: sample ids run through all of them."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self._readers = readers
        self._ends = np.cumsum([len(reader) for reader in readers])
        self.in_memory = all(reader.in_memory for reader in readers)
        self.labels = np.concatenate([reader.labels for reader in readers])

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, ids: np.ndarray) -> Tensor:
        """uint8 (n, height, width, 3), in the order of the ids."""
        of = np.searchsorted(self._ends, ids, side="right")
        parts, places = [], []
        for i, reader in enumerate(self._readers):
            place = np.flatnonzero(of == i)
            first = self._ends[i] - len(reader)
            parts.append(torch.as_tensor(reader.read(ids[place] - first)))
            places.append(place)
        images = torch.cat(parts)
        return images[on_device(np.argsort(np.concatenate(places), kind="stable"), images.device)]


def copied_ahead(array: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """What is on the host, where a GPU can copy it from while the host goes on."""
    tensor = torch.as_tensor(array)
    return tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy that nobody waits for."""
    return copied_ahead(array, device).to(device, non_blocking=True)


class Opened(NamedTuple):
    """Readers, and why they are what they are."""

    readers: list[Reader]
    kind: str
    why: str


def open_readers(
    splits: Sequence[Split],
    kind: Kind,
    cache_dir: str | None,
    device: torch.device,
    warn: Callable[[str], None],
    tell: Callable[[str], None],
) -> Opened:
    """Readers of some splits.

    Args:
        cache_dir: folder for decoded pixels; None for one of this user's in the temporary folder.
        device: of this worker.
        warn: called where a wanted way is not possible and another is taken.
        tell: called with a line about what is waited for.
    """
    folder = Path(cache_dir) if cache_dir else temporary_folder() / f"dlops_dist-{os.getuid()}"
    size = sum(map(bytes_of, splits))
    why = "as asked for"
    if kind == "auto":
        missing = [split for split in splits if not pixels_file(split, folder).is_file()]
        kind, why = _choose(size, sum(map(bytes_of, missing)), folder, device)
    readers: list[Reader] = list(splits)
    if kind != "decode":
        try:
            readers = [DecodedReader(split, decoded_pixels(split, folder, tell)) for split in splits]
            why += f"; kept in {folder}"
        except OSError as error:
            why = f"{folder} cannot hold {size / 1e9:.2f} GB of decoded images: {error.strerror or error}"
            setting = "data.cache_dir" if cache_dir else "TMPDIR"
            warn(f"{setting}: {why}; decoding each image when it is wanted, unless --data.cache-dir names another")
            kind = "decode" if kind == "decoded" else kind
    if kind == "device":
        readers = [DeviceReader(reader, device) for reader in readers]
    return Opened(readers, kind, why)


def bytes_of(split: Split) -> int:
    """Of its decoded pixels."""
    return len(split) * split.manifest.height * split.manifest.width * 3


def _choose(size: int, size_to_write: int, folder: Path, device: torch.device) -> tuple[Kind, str]:
    """What fits: `size` bytes into memory, those of them that are not there yet onto the disk."""
    pixels = f"{size / 1e9:.2f} GB of pixels"
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if size * LARGEST_PART <= free:
            return "device", f"{pixels} fit {free / 1e9:.0f} GB of free GPU memory"
    memory = available_memory()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    disk = shutil.disk_usage(existing).free
    if size * LARGEST_PART > memory:
        return "decode", f"{pixels} are more than a quarter of {memory / 1e9:.0f} GB of memory"
    if size_to_write * LARGEST_PART > disk:
        return "decode", f"{pixels} are more than a quarter of {disk / 1e9:.0f} GB of disk"
    return "decoded", f"{pixels} fit {memory / 1e9:.0f} GB of memory"


def pixels_file(split: Split, folder: Path) -> Path:
    """Where the pixels of a split lie: its dataset's id is in the name."""
    return folder / f"{split.manifest.id[:16]}-{split.name}.pixels"


def decoded_pixels(split: Split, folder: Path, tell: Callable[[str], None]) -> np.ndarray:
    """All images of a split, uint8 (N, height, width, 3), mapped from a file in `folder`, which is made if needed.

    Args:
        folder: on a disk of this node; its owner must be this user.
        tell: called with a line about what is waited for.

    Raises:
        OSError: the folder cannot hold the file.
        UserError: a sample is damaged.
    """
    shape = (len(split), split.manifest.height, split.manifest.width, 3)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    if not len(split):
        return np.empty(shape, np.uint8)
    path = pixels_file(split, folder)
    if not _is_checked(path):
        waiting = f"waiting for another process of this node to decode or check {path.name}"
        with locked(folder / f".{path.name}.lock", "decoded", lambda: tell(waiting)):
            if not _is_checked(path) and not _is_whole(path, tell):
                _write(split, path, shape, tell)
    return np.memmap(path, np.uint8, "r", shape=shape)


def _hash_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_checked(path: Path) -> bool:
    """Whether the file was whole since the node was started, and has not been written to since."""
    return path.is_file() and _hash_file(path).is_file() and _hash_file(path).read_text().endswith(f"\n{_state(path)}")


def _is_whole(path: Path, tell: Callable[[str], None]) -> bool:
    """Whether the file holds the bytes that were written; if so, nobody has to look again until the node is started."""
    if not (path.is_file() and _hash_file(path).is_file()):
        return False
    tell(f"checking {path.name} once for this node, {path.stat().st_size / 1e9:.2f} GB")
    sha256 = _hash_file(path).read_text().partition("\n")[0]
    if sha256 != sha256_of(path):
        return False
    _note(path, sha256)
    return True


def _state(path: Path) -> str:
    """What would be another of a file that was written to, or after a start of the node."""
    status = path.stat()
    return f"{psutil.boot_time():.0f} {status.st_ino} {status.st_size} {status.st_mtime_ns}"


def _note(path: Path, sha256: str) -> None:
    """That the file has this hash now."""
    write_file(_hash_file(path), lambda file: file.write(f"{sha256}\n{_state(path)}".encode()))


def _write(split: Split, path: Path, shape: tuple[int, ...], tell: Callable[[str], None]) -> None:
    sha256 = ""

    def write_to(file: BinaryIO) -> None:
        nonlocal sha256
        os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)))  # a full disk is an error here, not a bus error
        pixels = np.memmap(file, np.uint8, "r+", shape=shape)
        _decode_into(pixels, split, tell)
        pixels.flush()
        sha256 = hashlib.sha256(pixels.data).hexdigest()

    write_file(path, write_to)
    _note(path, sha256)


def _decode_into(pixels: np.ndarray, split: Split, tell: Callable[[str], None]) -> None:
    def decode(start: int) -> int:
        ids = np.arange(start, min(start + BLOCK, len(split)))
        pixels[start : start + BLOCK] = split.read(ids)
        return start + len(ids)

    told = time.monotonic()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        try:
            for done in pool.map(decode, range(0, len(split), BLOCK)):
                if time.monotonic() - told > TELL_EVERY_S:
                    told = time.monotonic()
                    tell(f"decoding {split.name} once for this node: {done:,} of {len(split):,} images")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
