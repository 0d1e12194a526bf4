"""Three ways to read images, all of the same bits: decode them, map decoded ones, or keep them on the device.

decode   each image from its shard, whenever it is wanted: `Split` itself
decoded  from a file of raw pixels that is made once for each node (`cache`)
device   from a tensor on the GPU that holds all of them
"""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dlops_dist.data.cache import decoded_pixels, pixels_file
from dlops_dist.data.memory import available_memory
from dlops_dist.data.shards import Split
from dlops_dist.files import temporary_folder

Kind = Literal["auto", "decode", "decoded", "device"]
LARGEST_PART = 4
"""auto: pixels may fill a quarter of a GPU's free memory, or of a container's memory and of the disk's free space."""
LOADED_AT_ONCE = 4096


class Reader(Protocol):
    """The images and labels of a split."""

    labels: np.ndarray
    """(N,) int64."""
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
