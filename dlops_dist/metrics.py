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


Metric = Callable[[Judged], Tensor]
"""Gives (n,), one number for each of the samples. It is given the samples of a block, and where it has `sees = "all"`
those of the whole split beside them."""


def top_k(k: int) -> Metric:
    """Whether the label is among the k classes with the largest logits."""
    return lambda judged: rank_of_label(judged.logits, judged.labels) < k


def nearest_center(judged: Judged) -> Tensor:
    """Whether the nearest of the classes' mean training embeddings is the label's."""
    return nearest_center_correct(judged.embeddings, judged.labels, judged.class_means)


class recall_at:  # noqa: N801  # a metric that is made as top_k is
    """Whether one of the k nearest other samples has the label (Musgrave et al. 2020, section 3)."""

    sees = "all"

    def __init__(self, k: int) -> None:
        self.k = k

    def __call__(self, judged: Judged) -> Tensor:
        return retrieved(judged.all_embeddings, judged.all_labels, judged.place, self.k).any(dim=1)


class map_at_r:  # noqa: N801
    """Mean average precision over the R nearest others, R the number of others with the label; 0 where there are none.

        MAP@R_i = 1/R sum_{j <= R} [the j-th has the label] (part with the label among the first j)

    (Musgrave et al. 2020, section 3.2.)
    """

    sees = "all"

    def __call__(self, judged: Judged) -> Tensor:
        r = max(1, judged.largest_class - 1)
        same = retrieved(judged.all_embeddings, judged.all_labels, judged.place, r).double()
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


def confusion_counts(logits: Tensor, labels: Tensor) -> Tensor:
    """How many samples of each class (row) have their first largest logit at which (column): int64 (C, C).

    Its diagonal counts the top-1 hits of `rank_of_label`; rows of logits with a NaN are left out.
    """
    counts = labels.new_zeros(logits.shape[1], logits.shape[1])
    valid = ~logits.isnan().any(dim=1)
    return counts.index_put_((labels, logits.argmax(dim=1)), valid.long(), accumulate=True)


def nearest_center_correct(embeddings: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """Boolean (N,): whether the nearest of the centers (C, D) is the label's (Euclidean).

    A centre with a NaN, that of a class never seen, is nearest to nothing.
    """
    seen = ~centers.isnan().any(dim=1)
    distances = _squared_distances(embeddings, centers.nan_to_num())
    classes = torch.arange(len(centers), device=centers.device).expand_as(distances)
    return _nearest_label(distances.masked_fill(~seen, torch.inf), classes) == labels


def retrieved(embeddings: Tensor, labels: Tensor, queries: slice, k: int) -> Tensor:
    """Boolean (n, k): for each query among the embeddings (N, D), whether each of the k nearest other samples has its
    label, the nearest first; of equal ones the first counts as nearer.

    Those that a matrix product finds nearest are compared by their differences: among embeddings that nearly coincide
    it has few digits left.
    """
    x = wide(embeddings)
    rows = torch.arange(*queries.indices(len(x)), device=labels.device)
    distances = _squared_distances(x[queries], x)
    distances.scatter_(1, rows[:, None], torch.inf)
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


def _nearest_label(distances: Tensor, labels: Tensor) -> Tensor:
    """The label, (N, M) as the distances, of each row's nearest column; -1 where no distance is finite."""
    nearest = distances.argmin(dim=1, keepdim=True)
    found = distances.gather(1, nearest).isfinite()
    return torch.where(found, labels.gather(1, nearest), -1).squeeze(1)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, M), at least float32, with the mean of b taken off first for the digits' sake."""
    a, b = wide(a), wide(b)
    shift = b.mean(dim=0)
    a, b = a - shift, b - shift
    return torch.addmm(b.square().sum(dim=1), a, b.T, alpha=-2) + a.square().sum(dim=1, keepdim=True)


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()
