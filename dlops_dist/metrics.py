"""Metrics: one number for each sample, whose mean over all of them is the figure. Top-k, nearest centre, retrieval."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

COMPARED_VALUES = 2**25
"""That are compared at once, 128 MB in float32."""
COMPARED = 64
"""Nearest samples of a query whose distances are compared exactly, besides those that are asked for."""


class Judged(NamedTuple):
    """Some samples of an evaluation, as a metric is given them."""

    embeddings: Tensor
    """(n, D); of length 1 where the recipe compares them by their directions."""
    labels: Tensor
    """(n,)"""
    logits: Tensor
    """(n, C); none, (n, 0), for a metric that sees all samples."""
    class_means: Tensor
    """(C, D) mean training embedding of each class, NaN for one that was not trained on."""
    all_embeddings: Tensor
    """(N, D) of the whole split, for a metric that sees all samples; else those above. So are the labels."""
    all_labels: Tensor
    place: slice
    """Where the samples stand among all."""
    largest_class: int
    """How many of all samples have the most frequent label."""
    centers: "Points | None" = None
    """The class means, prepared once for all blocks; so are all embeddings, as `points`."""
    points: "Points | None" = None


class Points:
    """Points (M, D), prepared once to find how far others are from them: squared, by a matrix product, at least in
    float32, with the points' mean taken off first for the digits' sake.

    Args:
        left_out: boolean (M,): infinitely far from all.
    """

    def __init__(self, x: Tensor, left_out: Tensor | None = None) -> None:
        x = wide(x)
        self._shift = x.mean(dim=0)
        self._centered = x - self._shift
        self._squares = _squares(self._centered)
        if left_out is not None:
            self._squares = self._squares.masked_fill(left_out, torch.inf)
        self._last: tuple[slice, Tensor] | None = None

    def distances(self, a: Tensor) -> Tensor:
        """(N, M) of a (N, D)."""
        return self._from_centered(wide(a) - self._shift)

    def distances_among(self, rows: slice) -> Tensor:
        """(N, M) of some of the points themselves, infinite from itself; kept for the next metric that asks for it."""
        if self._last is None or self._last[0] != rows:
            self._last = None
            places = torch.arange(*rows.indices(len(self._squares)), device=self._squares.device)
            found = self._from_centered(self._centered[rows])
            self._last = rows, found.scatter_(1, places[:, None], torch.inf)
        return self._last[1]

    def _from_centered(self, a: Tensor) -> Tensor:
        return torch.addmm(self._squares, a, self._centered.T, alpha=-2).add_(_squares(a)[:, None])


def centers_of(means: Tensor) -> Points:
    """Class means (C, D); one with a NaN, that of a class never seen, is nearest to nothing."""
    return Points(means.nan_to_num(), means.isnan().any(dim=1))


Metric = Callable[[Judged], Tensor]
"""Gives (n,), one number for each of the samples. It is given the samples of a block, and where it has `sees = "all"`
those of the whole split beside them."""


def top_k(k: int) -> Metric:
    """Whether the label is among the k classes with the largest logits."""
    return lambda judged: rank_of_label(judged.logits, judged.labels) < k


def nearest_center(judged: Judged) -> Tensor:
    """Whether the nearest of the classes' mean training embeddings is the label's."""
    return nearest_center_correct(judged.embeddings, judged.labels, judged.centers or centers_of(judged.class_means))


class recall_at:  # noqa: N801  # a metric that is made as top_k is
    """Whether one of the k nearest other samples has the label (Musgrave et al. 2020, section 3)."""

    sees = "all"

    def __init__(self, k: int) -> None:
        self.k = k

    def __call__(self, judged: Judged) -> Tensor:
        return retrieved(judged, self.k).any(dim=1)


class map_at_r:  # noqa: N801
    """Mean average precision over the R nearest others, R the number of others with the label; 0 where there are none.

        MAP@R_i = 1/R sum_{j <= R} [the j-th has the label] (part with the label among the first j)

    (Musgrave et al. 2020, section 3.2.)
    """

    sees = "all"

    def __call__(self, judged: Judged) -> Tensor:
        r = max(1, judged.largest_class - 1)
        same = retrieved(judged, r).double()
        place = torch.arange(1, same.shape[1] + 1, device=same.device)
        ordered = judged.all_labels.sort().values
        ends = [torch.searchsorted(ordered, judged.labels, right=right) for right in (False, True)]
        mates = (ends[1] - ends[0] - 1)[:, None]
        precision = same.cumsum(dim=1) / place * same * (place <= mates)
        return precision.sum(dim=1) / mates[:, 0].clamp(min=1)


def rank_of_label(logits: Tensor, labels: Tensor) -> Tensor:
    """For each row of logits (N, C), how many classes come before its label: below k means a top-k hit.

    Of equal logits the lower class comes first, so the rank is exact and the same on every device. A row with
    a NaN counts as a miss.
    """
    own = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=logits.device)
    before = (logits > own) | ((logits == own) & (classes < labels[:, None]))
    return torch.where(logits.isnan().any(dim=1), logits.shape[1], before.sum(dim=1))


def class_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How many samples of each class have their first largest logit at it: int64 (C,); rows with a NaN do not."""
    hits = rank_of_label(logits, labels) < 1
    return labels.new_zeros(logits.shape[1]).index_put_((labels,), hits.long(), accumulate=True)


def add_confusion(counts: Tensor, logits: Tensor, labels: Tensor) -> None:
    """Count how many samples of each class (row) have their first largest logit at which (column): of (C, C).

    The diagonal counts what `class_hits` does; rows of logits with a NaN are left out.
    """
    valid = ~logits.isnan().any(dim=1)
    counts.index_put_((labels, logits.argmax(dim=1)), valid.to(counts.dtype), accumulate=True)


def nearest_center_correct(embeddings: Tensor, labels: Tensor, centers: Points) -> Tensor:
    """Boolean (N,): whether the nearest of the centers is the label's (Euclidean)."""
    distances = centers.distances(embeddings)
    nearest = distances.argmin(dim=1, keepdim=True)
    return (distances.gather(1, nearest).isfinite() & (nearest == labels[:, None]))[:, 0]


def retrieved(judged: Judged, k: int) -> Tensor:
    """Boolean (n, k): of each sample judged, whether each of the k nearest others of all has its label, the nearest
    first; of equal ones the first counts as nearer.

    Those that a matrix product finds nearest are compared by their differences: among embeddings that nearly coincide
    it has few digits left.
    """
    x, labels = wide(judged.all_embeddings), judged.all_labels
    rows = torch.arange(*judged.place.indices(len(x)), device=labels.device)
    distances = (judged.points or Points(x)).distances_among(judged.place)
    near = distances.topk(min(COMPARED + k - 1, len(x)), dim=1, largest=False).indices.sort(dim=1).values
    size = max(1, COMPARED_VALUES // max(1, near.shape[1] * x.shape[1]))
    parts = zip(rows.split(size), near.split(size), strict=True)
    pairs = [torch.cdist(x[a][:, None], x[b], compute_mode="donot_use_mm_for_euclid_dist")[:, 0] for a, b in parts]
    exact = torch.cat(pairs).masked_fill_(near == rows[:, None], torch.inf)
    nearest = exact.sort(dim=1, stable=True)
    same = labels[near.gather(1, nearest.indices)] == labels[rows][:, None]
    return (same & nearest.values.isfinite())[:, :k]


def unit_length(embeddings: Tensor) -> Tensor:
    """Embeddings scaled to length 1, in float32 at least."""
    return F.normalize(wide(embeddings), dim=1)


def _squares(x: Tensor) -> Tensor:
    """Of the rows' lengths, (N,): a part at a time, as their squares would take as much memory again."""
    parts = x.split(max(1, COMPARED_VALUES // max(1, 8 * x.shape[1])))
    return torch.cat([part.square().sum(dim=1) for part in parts])


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()
