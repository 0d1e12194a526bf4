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


def balanced_epoch(seed: int, epoch: int, labels: Ids, global_batch_size: int, samples_per_class: int) -> Ids:
    """Batches of P = G / K classes with K samples each, (steps, G); every sample at most once an epoch.

    The samples of each class are shuffled and cut into groups of K; each batch takes one group of each of the P
    classes with most groups left, ties broken at random, which gives as many batches as there can be. A batch lists
    one sample of each class, then a second of each, and so on: each rank's part holds as many classes as it can.
    """
    classes_per_batch = global_batch_size // samples_per_class
    by_class = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels))
    order_key = key(seed, epoch, "order")
    groups = []
    for c, members in enumerate(np.split(by_class, ends[:-1])):
        mixed = members[shuffled(order_key ^ c, len(members))]
        groups.append(mixed[: len(mixed) // samples_per_class * samples_per_class].reshape(-1, samples_per_class))

    ties = iter(shuffled(key(seed, epoch, "class order"), sum(map(len, groups)) + len(groups)).tolist())
    left = [(-len(g), next(ties), c) for c, g in enumerate(groups) if len(g)]
    heapq.heapify(left)
    batches = []
    while len(left) >= classes_per_batch:
        taken = [heapq.heappop(left) for _ in range(classes_per_batch)]
        batches.append(np.stack([groups[c][negative_left] for negative_left, _, c in taken], axis=1).ravel())
        for negative_left, _, c in taken:
            if negative_left < -1:
                heapq.heappush(left, (negative_left + 1, next(ties), c))
    return np.stack(batches) if batches else np.empty((0, global_batch_size), np.int64)


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
