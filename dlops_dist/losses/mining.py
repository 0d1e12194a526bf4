"""Which triplets of a batch count: the samples of each class, how near all others are, and what is picked of them."""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

WEYL = 0x9E3779B97F4A7C15 - 2**64  # odd, and far from a pattern of bits
COMPARED = 64  # samples of a class whose distances from an anchor are compared exactly
CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**23}  # of a distance matrix held at once: 8 and 32 MB in float32
PART_ELEMENTS = 2**18  # of embeddings that a CPU goes over while they are in its cache


class ClassMates(NamedTuple):
    """R anchors, and the samples of their classes: at most M of a class, and never an R x N mask."""

    rows: Tensor
    """(R,) the anchors' indices."""
    members: Tensor
    """(R, M) indices of the samples of the anchor's class, ascending, itself among them; the last is repeated."""
    is_positive: Tensor
    """(R, M) neither the anchor nor a repetition."""
    num_negatives: Tensor
    """(R,) number of samples of other classes."""


class Triplets(NamedTuple):
    """T rows, of which some may be none: to leave those out would make a GPU wait until they are counted."""

    anchors: Tensor
    """(T,) indices."""
    others: Tensor
    """(2, T) indices of the positives, and of the negatives."""
    valid: Tensor
    """(T,) whether the row is a triplet."""


class Classes:
    """The samples of each class of a batch with labels (N,), of which the largest class has so many."""

    def __init__(self, labels: Tensor, largest_class: int) -> None:
        self._by_class = labels.argsort(stable=True)
        ordered = labels[self._by_class]
        self._start = torch.searchsorted(ordered, labels)
        self._end = torch.searchsorted(ordered, labels, right=True)
        self._places = torch.arange(largest_class, device=labels.device)

    def members(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For rows (R,): indices (R, M) of the samples of their classes, ascending; which are no repetition of the last
        one, (R, M); how many these are, (R,)."""
        start, end = self._start[rows], self._end[rows]
        place = start[:, None] + self._places
        return self._by_class[place.minimum(end[:, None] - 1)], place < end[:, None], end - start

    def mates(self, first: int, last: int) -> Iterator[ClassMates]:
        """Of the anchors from first to last, in chunks."""
        num_samples = len(self._by_class)
        size = max(1, chunk_elements(self._by_class) // max(1, num_samples))
        for rows in torch.arange(first, last, device=self._by_class.device).split(size) if last > first else ():
            members, is_first, number = self.members(rows)
            yield ClassMates(rows, members, is_first & (members != rows[:, None]), num_samples - number)


class Nearness:
    """How far the samples (N, D) of a batch are from each other: of all by a product, of few by their differences."""

    def __init__(self, x: Tensor) -> None:
        self.x, self._centered = x, x - x.mean(dim=0)
        self._norms = by_rows(lambda part: part.square().sum(dim=1), self._centered)
        self._original = _first_equal(x)
        self._repeated = on_gpu(x) or bool((self._original != torch.arange(len(x))).any())

    def all_from(self, rows: Tensor) -> Tensor:
        """What orders all samples b by their distance from a, (R, N) for rows (R,): ||b||^2 - 2ab, or less ||a||^2.

        The mean is taken off first: the sum loses all digits where the embeddings nearly coincide. A matrix product may
        round equal columns differently: those of equal samples are made equal again.
        """
        nearness = torch.addmm(self._norms, self._centered[rows], self._centered.T, alpha=-2)
        if self._repeated:
            nearness = nearness[:, self._original]
            equal = self._original[rows][:, None] == self._original
            torch.where(equal, -self._norms[rows, None], nearness, out=nearness)
        return nearness

    def most_lost(self) -> Tensor:
        """By how much two of `all_from` may lie apart in another order than `exact` does.

        A sum of D products, in any order, is off by at most D eps / 2 of their sizes (Higham 2002, section 3.1): here
        of 3 times the largest ||x||^2, in ||a - b||^2 of 4 times, so 7 D eps / 2 for each of the two. The rest is for
        the roundings of the mean's subtraction and of the square root.
        """
        return 8 * (self.x.shape[1] + 5) * torch.finfo(self.x.dtype).eps * self._norms.amax()

    def exact(self, rows: Tensor, others: Tensor) -> Tensor:
        """Distances (R, M) of rows (R,) from others (R, M)."""
        size = max(1, chunk_elements(self.x) // max(1, others.shape[1] * self.x.shape[1]))
        parts = zip(rows.split(size), others.split(size), strict=True)
        pairs = ((self.x[a][:, None], self.x[b]) for a, b in parts)
        return torch.cat([torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")[:, 0] for a, b in pairs])


@torch.no_grad()
def mined(
    nearness: Nearness, classes: Classes, chunks: Iterator[ClassMates], mining: Literal["batch-hard", "semi-hard"]
) -> Iterator[Triplets]:
    """The triplets of a batch: batch-hard those of all chunks at once, which are few, semi-hard those of each."""
    if mining == "semi-hard":
        yield from (_semi_hard(mates, nearness) for mates in chunks)
    elif picked := [_batch_hard(classes, mates, nearness) for mates in chunks]:
        yield Triplets(*(torch.cat(parts, dim=-1) for parts in zip(*picked, strict=True)))


def _batch_hard(classes: Classes, mates: ClassMates, nearness: Nearness) -> Triplets:
    """One triplet for each row.

    In a tight class few digits are left of what orders all samples: the positives, and the nearest negative with its
    class, are compared exactly.
    """
    values = nearness.all_from(mates.rows)
    positives = _at_the_end(nearness, mates.rows, mates.members, mates.is_positive, values, 1)
    nearest = _argmin(values.scatter_(1, mates.members, torch.inf))
    members, is_first, _ = classes.members(nearest)
    negatives = _at_the_end(nearness, mates.rows, members, is_first, values, -1)
    valid = mates.is_positive.any(dim=1) & (mates.num_negatives > 0)
    return Triplets(mates.rows, torch.stack([positives, negatives]), valid)


def _at_the_end(
    nearness: Nearness, rows: Tensor, candidates: Tensor, wanted: Tensor, values: Tensor, sign: int
) -> Tensor:
    """(R,) of each row's candidates (R, M), the wanted one with the largest sign x exact distance; the first of equals.

    Of more than COMPARED, those with the largest sign x value, of values (R, N). A CPU computes distances only where
    the values are too close to tell.
    """
    look = not on_gpu(values)
    if look or candidates.shape[1] > COMPARED:
        score = (sign * values.gather(1, candidates)).masked_fill_(~wanted, -torch.inf)
    if candidates.shape[1] > COMPARED:
        place = score.topk(COMPARED, dim=1).indices.sort(dim=1).values
        candidates, wanted, score = (columns.gather(1, place) for columns in (candidates, wanted, score))
    if not look:
        score = sign * nearness.exact(rows, candidates)
    elif candidates.shape[1] > 1:
        best, second = score.topk(2, dim=1).values.unbind(dim=1)
        close = (best - second <= nearness.most_lost()).nonzero()[:, 0]
        score[close] = sign * nearness.exact(rows[close], candidates[close])
    end = score.masked_fill_(~wanted, -torch.inf).argmax(dim=1, keepdim=True)
    return candidates.gather(1, end)[:, 0]


def _semi_hard(mates: ClassMates, nearness: Nearness) -> Triplets:
    """One triplet for each positive pair of a row."""
    values = nearness.all_from(mates.rows)
    ordered, index = values.scatter(1, mates.members, torch.inf).sort(dim=1, stable=True)
    # the first negative that is farther than the positive
    place = torch.searchsorted(ordered, values.gather(1, mates.members), right=True)
    nearest_farther = index.gather(1, place.clamp(max=values.shape[1] - 1))
    farthest = values.scatter(1, mates.members, -torch.inf).argmax(dim=1, keepdim=True)
    negatives = torch.where(place < mates.num_negatives[:, None], nearest_farther, farthest)
    valid = mates.is_positive & (mates.num_negatives[:, None] > 0)
    anchors = mates.rows[:, None].expand_as(mates.members)
    others = torch.stack([mates.members.flatten(), negatives.flatten()])
    return Triplets(anchors.flatten(), others, valid.flatten())


def _first_equal(x: Tensor) -> Tensor:
    """For each row of x (N, D), the lowest index of a row with the same bits, (N,)."""
    bits = x.contiguous().view(torch.int32)
    factors = torch.arange(1, bits.shape[1] + 1, device=x.device) * WEYL
    factors = (factors.square() >> 32).int() | 1
    hashes = by_rows(lambda part: (part * factors).sum(dim=1), bits)  # integers: no order of summation matters
    ordered, index = hashes.sort(stable=True)
    lowest, own = index[torch.searchsorted(ordered, hashes)], torch.arange(len(x), device=x.device)
    if on_gpu(x):
        return torch.where((bits == bits[lowest]).all(dim=1), lowest, own)  # the first of equal hashes
    later = (lowest != own).nonzero()[:, 0]
    own[later] = torch.where((bits[later] == bits[lowest[later]]).all(dim=1), lowest[later], later)
    return own


def _argmin(x: Tensor) -> Tensor:
    """Of each row (R, N), the first least; on a CPU by numpy, which is six times as fast."""
    return x.argmin(dim=1) if on_gpu(x) else torch.from_numpy(x.numpy().argmin(axis=1))


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of each row of x (N, D), (N,): on a CPU a part at a time, which changes nothing but the time."""
    parts = [x] if on_gpu(x) else x.split(max(1, PART_ELEMENTS // max(1, x.shape[1])))
    return function(x) if len(parts) == 1 else torch.cat([function(part) for part in parts])


def chunk_elements(x: Tensor) -> int:
    return CHUNK_ELEMENTS["cuda" if on_gpu(x) else "cpu"]


def on_gpu(x: Tensor) -> bool:
    """Whether to look at a value makes the host wait, and what a few samples alone need is cheaper for all of them."""
    return x.is_cuda
