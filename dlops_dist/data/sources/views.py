"""A source seen otherwise: with fewer images, or with all of one size."""

from functools import cached_property

import numpy as np

from dlops_dist.data.codec import decode, encode
from dlops_dist.data.keys import key
from dlops_dist.data.order import shuffled
from dlops_dist.data.sources.image_folder import to_rgb
from dlops_dist.data.sources.source import Listing, Source


class Limited:
    """At most `limit` images of each split, as many of each class as can be, chosen by the seed."""

    def __init__(self, source: Source, limit: int, seed: int) -> None:
        self.source, self.limit, self.seed = source, limit, seed
        self.extension = source.extension

    @property
    def classes(self) -> list[str]:
        return self.source.classes

    @cached_property
    def _kept(self) -> dict[str, np.ndarray]:
        return {split: self._chosen(listing.labels) for split, listing in self.source.splits.items()}

    def _chosen(self, labels: np.ndarray) -> np.ndarray:
        """The first of every class, then the second of every class, and so on, in a shuffled order; then sorted."""
        mixed = shuffled(key(self.seed, 0, "limit"), len(labels))
        by_class = mixed[np.argsort(labels[mixed], kind="stable")]
        starts = np.searchsorted(labels[by_class], labels[by_class])
        round_of = np.arange(len(labels)) - starts
        return np.sort(by_class[np.argsort(round_of, kind="stable")][: self.limit])

    @cached_property
    def splits(self) -> dict[str, Listing]:
        listings = {}
        for split, (keys, labels, folds) in self.source.splits.items():
            kept = self._kept[split]
            listings[split] = Listing([keys[i] for i in kept], labels[kept], None if folds is None else folds[kept])
        return listings

    def read(self, split: str, index: int) -> bytes:
        return self.source.read(split, int(self._kept[split][index]))

    def stamp(self) -> str:
        return self.source.stamp()


class Resized:
    """Every image size x size: the shorter side scaled by bicubic interpolation, the longer one cropped in the middle.

    Those that have the size already stay as they are, byte by byte.
    """

    def __init__(self, source: Source, size: int) -> None:
        self.source, self.size = source, size
        self.extension = source.extension

    @property
    def classes(self) -> list[str]:
        return self.source.classes

    @property
    def splits(self) -> dict[str, Listing]:
        return self.source.splits

    def read(self, split: str, index: int) -> bytes:
        from PIL import Image, ImageOps

        data = self.source.read(split, index)
        # Pillow decodes what simplejpeg does not, such as CMYK
        is_jpeg, name = self.extension == "jpg", self.splits[split].keys[index]
        pixels = to_rgb(data, name) if is_jpeg else decode(data, self.extension)
        if pixels.shape[:2] == (self.size, self.size):
            return data
        fitted = ImageOps.fit(Image.fromarray(pixels), (self.size, self.size), Image.Resampling.BICUBIC)
        return encode(np.asarray(fitted), self.extension)

    def stamp(self) -> str:
        return self.source.stamp()
