"""A source seen otherwise: with fewer images."""

from functools import cached_property

import numpy as np

from dlops_dist.data.keys import key
from dlops_dist.data.order import shuffled
from dlops_dist.data.sources.source import Listing, Source


class Limited:
    """At most `limit` images of each split, as many of each class as can be, chosen by the seed."""

    def __init__(self, source: Source, limit: int, seed: int) -> None:
        self.source, self.limit, self.seed = source, limit, seed
        self.extension, self.path = source.extension, source.path

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

    def name(self, split: str, index: int) -> str:
        return self.source.name(split, int(self._kept[split][index]))

    def stamp(self) -> str:
        return self.source.stamp()
