"""Which sample when: pure functions of (seed, epoch, sizes), the same on every worker and for any number of them.

An epoch is an array (steps, G) of sample ids; step s of the run takes row s. Rank r of W takes the r-th contiguous
part of a row, so that a gather in rank order rebuilds the row. Nothing is stored: to resume is to index.
"""

import heapq

import numpy as np

from dlops_dist.data.keys import key
from dlops_dist.errors import UserError

Ids = np.ndarray
LEAST_SAMPLES_PER_CLASS = 4


def shuffled(shuffle_key: int, size: int) -> Ids:
    """A uniform permutation of range(size), int64.

    Sorts random numbers whose low bits are the index: no ties, so no sorting algorithm can matter, and
    Philox's raw bits are the same in every version of numpy.
    """
    low = np.uint64(2 ** size.bit_length() - 1)
    keys = np.random.Philox(key=shuffle_key).random_raw(size)
    keys = (keys & ~low) | np.arange(size, dtype=np.uint64)
    keys.sort()
    return (keys & low).astype(np.int64)


def uniform_epoch(seed: int, epoch: int, size: int, global_batch_size: int) -> Ids:
    """All whole batches of a shuffled epoch, (size // G, G); the remainder is `last_batch`."""
    steps = size // global_batch_size
    return shuffled(key(seed, epoch, "order"), size)[: steps * global_batch_size].reshape(steps, global_batch_size)


def last_batch(seed: int, epoch: int, size: int, global_batch_size: int) -> Ids:
    """The ids that `uniform_epoch` leaves over, (size % G,)."""
    return shuffled(key(seed, epoch, "order"), size)[size - size % global_batch_size :]


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
        by_class = np.argsort(labels, kind="stable")
        members = np.split(by_class, np.cumsum(np.bincount(labels))[:-1])
        fill = [np.resize(m, samples_per_class) if repeat and 0 < len(m) < samples_per_class else m for m in members]
        self._members = fill
        self.sizes = np.array([len(m) for m in members])
        groups = np.array([len(m) // samples_per_class for m in fill])
        self.left_out = np.flatnonzero((self.sizes > 0) & (groups == 0))
        """The classes that no batch holds."""
        self.num_batches = _most_batches(groups, self.classes_per_batch)
        self._groups = np.minimum(groups, self.num_batches)
        self._used = np.flatnonzero(self._groups).tolist()
        self._spare = int(self._groups.sum()) - self.num_batches * self.classes_per_batch

    @property
    def rounds(self) -> int:
        """Epochs within which every sample comes, but those of classes that are left out."""
        number, k = len(self._used), self.samples_per_class
        rounds = [1]
        for c in self._used:  # E epochs take at least E groups - ceil(E spare / number) groups of it
            samples = len(self._members[c]) + k * (self._spare > 0)
            rounds.append(-(-samples * number // (k * (int(self._groups[c]) * number - self._spare))))
        return max(rounds)

    def epoch(self, seed: int, epoch: int) -> Ids:
        """(steps, G). A batch lists one sample of each class, then a second of each, and so on: each rank's part holds
        as many classes as it can."""
        order_key = key(seed, epoch, "order")
        groups = {c: self._groups_of(c, place, seed, epoch, order_key) for place, c in enumerate(self._used)}
        ties = iter(
            shuffled(key(seed, epoch, "class order"), sum(map(len, groups.values())) + len(self.sizes)).tolist()
        )
        left = [(-len(g), next(ties), c) for c, g in groups.items() if len(g)]
        heapq.heapify(left)
        batches = []
        for _ in range(self.num_batches):
            taken = [heapq.heappop(left) for _ in range(self.classes_per_batch)]
            batches.append(np.stack([groups[c][negative_left] for negative_left, _, c in taken], axis=1).ravel())
            for negative_left, _, c in taken:
                if negative_left < -1:
                    heapq.heappush(left, (negative_left + 1, next(ties), c))
        if not batches:
            return np.empty((0, self.classes_per_batch * self.samples_per_class), np.int64)
        return np.stack(batches)

    def _groups_of(self, c: int, place: int, seed: int, epoch: int, order_key: int) -> Ids:
        """A class's groups of an epoch, (g, K): those that follow its groups of all epochs before, shuffled."""
        members, k = self._members[c], self.samples_per_class
        spared, now = (self._times_spared(place, e) for e in (epoch, epoch + 1))
        taken = (self._groups[c] - (now - spared)) * k
        if taken < len(members):
            in_turn = members[shuffled(key(seed, 0, "rotation") ^ c, len(members))]
            first = (epoch * self._groups[c] - spared) * k
            members = in_turn[(first + np.arange(taken)) % len(members)]
        return members[shuffled(order_key ^ c, len(members))].reshape(-1, k)

    def _times_spared(self, place: int, epochs: int) -> int:
        """In how many of the first epochs a class gave one group less, as some fill no batch: each in its turn."""
        return max(0, -((place - epochs * self._spare) // len(self._used)))


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
    rank_in_shuffle = np.empty(len(labels), np.int64)
    rank_in_shuffle[shuffled(key(0, 0, "holdout"), len(labels))] = np.arange(len(labels))
    by_class = np.lexsort((rank_in_shuffle, labels))
    sizes = np.bincount(labels)
    place = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    held = place < np.repeat(np.round(fraction * sizes), sizes)
    return np.sort(by_class[~held]), np.sort(by_class[held])


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
