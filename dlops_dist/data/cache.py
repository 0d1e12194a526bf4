"""Decoded once for each node: raw pixels in a file that all its workers map into memory.

One process decodes while the others wait; the lock goes with it, however it ends. The file gets its name when it is
whole, and every process compares its hash before it reads from it.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dlops_dist.data.shards import Split, sha256_of

BLOCK = 512
"""Images that a thread decodes at a time."""
TELL_EVERY_S = 5.0


def decoded_pixels(split: Split, folder: Path, tell: Callable[[str], None]) -> np.ndarray:
    """All images of a split, uint8 (N, height, width, 3), mapped from a file in `folder`, which is made if needed.

    Args:
        folder: on a disk of this node; its owner must be this user.
        tell: called with a line about what is waited for.

    Raises:
        OSError: the folder cannot hold the file.
        UserError: a sample is damaged.
    """
    manifest = split.manifest
    shape = (len(split), manifest.height, manifest.width, 3)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    path = pixels_file(split, folder)
    if not len(split):
        return np.empty(shape, np.uint8)
    with _locked(path, fcntl.LOCK_SH, tell):
        whole = _is_whole(path)
    if not whole:
        with _locked(path, fcntl.LOCK_EX, tell):
            if not _is_whole(path):
                _write(split, path, shape, tell)
    return np.memmap(path, np.uint8, "r", shape=shape)


def pixels_file(split: Split, folder: Path) -> Path:
    """Where the pixels of a split lie: its dataset's id is in the name."""
    return folder / f"{split.manifest.id[:16]}-{split.name}.pixels"


@contextmanager
def _locked(path: Path, kind: int, tell: Callable[[str], None]) -> Iterator[None]:
    """Shared by those who look, exclusive for the one who writes. On NFS too, where a lock needs a writable file."""
    with path.with_name(f".{path.name}.lock").open("a+b") as file:
        told = time.monotonic()
        while True:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - told > TELL_EVERY_S:
                    told = time.monotonic()
                    tell(f"waiting for another process of this node to decode {path.name}")
                time.sleep(0.1)
        yield


def _hash_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_whole(path: Path) -> bool:
    """Whether the file holds the bytes that were written."""
    return path.is_file() and _hash_file(path).is_file() and _hash_file(path).read_bytes() == sha256_of(path).encode()


def _write(split: Split, path: Path, shape: tuple[int, ...], tell: Callable[[str], None]) -> None:
    """Under another name until it is whole. What a killed process left there is written over."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w+b") as file:
            os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)))  # a full disk is an error here, not a bus error
            _decode_into(np.memmap(file, np.uint8, "r+", shape=shape), split, tell)
            os.fsync(file.fileno())
        _hash_file(path).write_text(sha256_of(partial))
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _decode_into(pixels: np.memmap, split: Split, tell: Callable[[str], None]) -> None:
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
    pixels.flush()
