"""What packing needs of a dataset: for each split a list of keys and labels, and the bytes of each image.

A source opens its files when it is first read, so it can be handed to other processes.
"""

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

MAX_BYTES = 2**26
"""Of one image or text file: an archive's member that claims more is taken for a decompression bomb."""
LITTER = ("__macosx", "thumbs.db", "desktop.ini", "@eadir")


def is_litter(name: str) -> bool:
    """Whether a path in an archive or folder is what systems leave beside files: hidden, __MACOSX/, Thumbs.db."""
    parts = name.split("/")
    return any(part.lower() in LITTER or (part.startswith(".") and part not in ("", ".", "..")) for part in parts)


class Listing(NamedTuple):
    """The samples of a split, sorted by key."""

    keys: list[str]
    labels: np.ndarray
    """(N,) int64; UNLABELED where there is none."""
    folds: np.ndarray | None = None
    """(N,) int32: bit f is set where the sample belongs to the dataset's own fold f."""


class Source(Protocol):
    """A dataset to pack."""

    @property
    def path(self) -> Path: ...

    @property
    def extension(self) -> str:
        """Of the image in a shard: jpg, or npy (raw uint8, height x width x 3)."""
        ...

    @property
    def classes(self) -> list[str]: ...

    @property
    def splits(self) -> dict[str, Listing]: ...

    def read(self, split: str, index: int) -> bytes:
        """The image of the index-th sample of a split, as its file holds it. Raises ValueError if that is no image."""
        ...

    def name(self, split: str, index: int) -> str:
        """Where a person finds it, below the path."""
        ...

    def stamp(self) -> str:
        """Differs once the files have changed: whether an interrupted packing may go on."""
        ...
