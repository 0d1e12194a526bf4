"""Which sample when: pure functions of (seed, epoch, sizes), the same on every worker and for any number of them.

An epoch is an array (steps, G) of sample ids; step s of the run takes row s. Rank r of W takes the r-th contiguous
part of a row, so that a gather in rank order rebuilds the row. Nothing is stored: to resume is to index.
"""

import heapq
from collections.abc import Iterator

import numpy as np

from dlops_dist.data.keys import key
from dlops_dist.errors import UserError

Ids = np.ndarray
AT_ONCE = 2**20
"""Samples, where a copy of all would take too much memory."""
LEAST_SAMPLES_PER_CLASS = 4


def shuffled(shuffle_key: int, size: int) -> Ids:
    """A uniform permutation of range(size), int64.

    Sorts random numbers whose low bits are the index: no ties, so no sorting algorithm can matter, and
    Philox's raw bits are the same in every version of numpy.
    """
    low = np.uint64(2 ** size.bit_length() - 1)
    keys = np.random.Philox(key=shuffle_key).random_raw(size)  # changed in place: a copy more is a gigabyte of 10^8
    keys &= ~low
    for start in range(0, size, AT_ONCE):
        keys[start : start + AT_ONCE] |= np.arange(start, min(start + AT_ONCE, size), dtype=np.uint64)
    keys.sort()
    keys &= low
    return keys.view(np.int64)


def uniform_epoch(
    seed: int, epoch: int, size: int, global_batch_size: int, drop_last: bool = True, first: int = 0
) -> Iterator[Ids]:
    """The batches of a shuffled epoch from the `first` step on; the last one, if it is kept, may be shorter."""
    batch, end = global_batch_size, size - size % global_batch_size * drop_last
    ids = shuffled(key(seed, epoch, "order"), size)[:end]
    return (ids[start : start + batch] for start in range(first * batch, end, batch))


class Balance:
    """Batches of P = G / K classes with K samples each, as many an epoch as there can be.

    The samples of a class are cut into groups of K; a batch takes one group of each of the P classes with most groups
    left, ties broken at random. No sample comes twice in an epoch. Of a class that has more groups than there are
    batches, an epoch takes those that follow the ones of the epoch before, so that each comes within `rounds` epochs;
    so it is with what is left of a class beside its groups of K, and with the few groups that fill no batch.

    Args:
        labels: (N,) of all samples.
        repeat: take the samples of a class that has fewer than K again until they are K; else leave them out.
    """

    def __init__(self, labels: Ids, global_batch_size: int, samples_per_class: int, repeat: bool = False) -> None:
        self.classes_per_batch, self.samples_per_class = global_batch_size // samples_per_class, samples_per_class
        self.sizes = np.bincount(labels)
        self._by_class = by_class(labels, len(self.sizes))
        self._ends = np.cumsum(self.sizes)
        sizes = self.sizes
        if repeat:
            sizes = np.where((sizes > 0) & (sizes < samples_per_class), samples_per_class, sizes)
        self._filled, groups = sizes, sizes // samples_per_class
        self.left_out = np.flatnonzero((self.sizes > 0) & (groups == 0))
        """The classes that no batch holds."""
        self.num_batches = _most_batches(groups, self.classes_per_batch)
        self._groups = np.minimum(groups, self.num_batches)
        self._used = np.flatnonzero(self._groups)
        self._spare = int(self._groups.sum()) - self.num_batches * self.classes_per_batch

    @property
    def rounds(self) -> int:
        """Epochs within which every sample comes, but those of classes that are left out."""
        number, k = len(self._used), self.samples_per_class
        samples = self._filled[self._used] + k * (self._spare > 0)
        # E epochs take at least E groups - ceil(E spare / number) groups of a class
        rounds = -(-samples * number // (k * (self._groups[self._used] * number - self._spare)))
        return int(rounds.max(initial=1))

    def epoch(self, seed: int, epoch: int, first: int = 0) -> Iterator[Ids]:
        """Batches (G,) from the `first` step on. A batch lists one sample of each class, then a second of each, and so
        on: each rank's part holds as many classes as it can."""
        order_key, used = key(seed, epoch, "order"), self._used
        spared, now = (self._times_spared(e) for e in (epoch, epoch + 1))
        taken = self._groups[used] - (now - spared)
        numbers = shuffled(key(seed, epoch, "class order"), int(taken.sum()) + len(self.sizes))
        ties = (tie for start in range(0, len(numbers), AT_ONCE) for tie in numbers[start : start + AT_ONCE].tolist())
        left = [(-n, next(ties), place) for place, n in enumerate(taken.tolist()) if n]
        heapq.heapify(left)
        groups: dict[int, Ids] = {}
        for step in range(self.num_batches):
            chosen = [heapq.heappop(left) for _ in range(self.classes_per_batch)]
            if step >= first:
                for _, _, place in chosen:
                    if place not in groups:
                        begun = epoch * int(self._groups[used[place]]) - int(spared[place])
                        groups[place] = self._groups_of(int(used[place]), begun, int(taken[place]), seed, order_key)
                yield np.stack([groups[place][negative_left] for negative_left, _, place in chosen], axis=1).ravel()
            for negative_left, _, place in chosen:
                if negative_left < -1:
                    heapq.heappush(left, (negative_left + 1, next(ties), place))

    def _groups_of(self, c: int, begun: int, number: int, seed: int, order_key: int) -> Ids:
        """A class's groups of an epoch, (number, K): those that follow its groups of all epochs before, shuffled."""
        k = self.samples_per_class
        members = np.resize(self._by_class[self._ends[c] - self.sizes[c] : self._ends[c]], self._filled[c])
        if number * k < len(members):
            in_turn = members[shuffled(key(seed, 0, "rotation") ^ c, len(members))]
            members = in_turn[(begun * k + np.arange(number * k)) % len(members)]
        return members[shuffled(order_key ^ c, len(members))].reshape(-1, k)

    def _times_spared(self, epochs: int) -> Ids:
        """In how many of the first epochs each class gave one group less, as some fill no batch: each in its turn."""
        places = np.arange(len(self._used))
        return np.maximum(0, -((places - epochs * self._spare) // max(1, len(places))))


def by_class(labels: Ids, num_classes: int) -> Ids:
    """Places of the samples, those of a class in their order, one class after the other; int32 where that is enough.

    A part at a time, whose places go behind those of earlier parts. Numbers of two bytes are sorted digit by digit, ten
    times sooner.
    """
    narrow, places = np.uint16 if num_classes <= 2**16 else np.int32, np.empty(len(labels), _kind_for(len(labels)))
    ends = np.cumsum(np.bincount(labels, minlength=num_classes))
    begun = np.concatenate([[0], ends[:-1]]) if num_classes else ends
    for start in range(0, len(labels), AT_ONCE):
        part = labels[start : start + AT_ONCE].astype(narrow)
        counts = np.bincount(part, minlength=num_classes)
        to = np.repeat(begun - (np.cumsum(counts) - counts), counts) + np.arange(len(part))
        places[to] = start + np.argsort(part, kind="stable")
        begun += counts
    return places


def _kind_for(size: int) -> type[np.signedinteger]:
    """Of ids below a size: half of the memory, where they are small enough."""
    return np.int32 if size < 2**31 else np.int64


def _most_batches(groups: Ids, classes_per_batch: int) -> int:
    """The largest B for which sum_c min(groups_c, B) >= B P."""
    low, high = 0, int(groups.sum()) // classes_per_batch
    while low < high:
        middle = (low + high + 1) // 2
        enough = np.minimum(groups, middle).sum() >= middle * classes_per_batch
        low, high = (middle, high) if enough else (low, middle - 1)
    return low


def fit_samples_per_class(global_batch_size: int, num_classes: int, wanted: int | None = None) -> int:
    """K of balanced batches: `wanted`, or the least K >= 4 that divides G into 2 to num_classes classes."""
    choices = [wanted] if wanted else range(LEAST_SAMPLES_PER_CLASS, global_batch_size + 1)
    for k in choices:
        if global_batch_size % k == 0 and 2 <= global_batch_size // k <= num_classes:
            return k
    shown = wanted or f">= {LEAST_SAMPLES_PER_CLASS}"
    raise UserError(
        f"data.samples_per_class: {shown} does not fit: it must divide global_batch_size {global_batch_size} "
        f"into 2 to {num_classes} classes"
    )


def hold_out(labels: Ids, fraction: float) -> tuple[Ids, Ids]:
    """Ids (train, val): of each class, round(fraction * size) samples are held out. Independent of a run's seed."""
    if not fraction:
        return np.arange(len(labels), dtype=_kind_for(len(labels))), np.empty(0, np.int32)
    mixed = shuffled(key(0, 0, "holdout"), len(labels))
    sizes = np.bincount(labels)
    ordered = mixed[by_class(labels[mixed], len(sizes))]
    place = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    held = np.zeros(len(labels), bool)
    held[ordered[place < np.repeat(np.round(fraction * sizes), sizes)]] = True
    kind = _kind_for(len(labels))
    return np.flatnonzero(~held).astype(kind), np.flatnonzero(held).astype(kind)


def limited(labels: Ids, limit: int | None, seed: int) -> Ids:
    """Ids of at most `limit` samples, sorted: as many of each class as can be, chosen by the seed."""
    mixed = shuffled(key(seed, 0, "limit"), len(labels))
    by_class = mixed[np.argsort(labels[mixed], kind="stable")]
    place_in_class = np.arange(len(labels)) - np.searchsorted(labels[by_class], labels[by_class])
    return np.sort(by_class[np.argsort(place_in_class, kind="stable")][:limit])


def blocks(ids: Ids, size: int | None) -> list[Ids]:
    """Ids cut into consecutive blocks of `size`, the last one shorter; one block where size is None.

    Blocks are cut before rank parts are: what goes through the model together does not depend on the ranks.
    """
    size = size or max(len(ids), 1)
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def rank_part(size: int, rank: int, world_size: int) -> slice:
    """The rank-th of world_size contiguous parts of range(size); sizes differ by at most one, larger ones first."""
    small, larger = divmod(size, world_size)
    first = rank * small + min(rank, larger)
    return slice(first, first + small + (rank < larger))


def part_sizes(size: int, world_size: int) -> list[int]:
    """The size of every rank's part."""
    parts = (rank_part(size, rank, world_size) for rank in range(world_size))
    return [part.stop - part.start for part in parts]
