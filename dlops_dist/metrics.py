"""Sums and counts that add up over samples: top-k, class-wise, nearest centre, Recall@1."""

import torch
from torch import Tensor
from torch.nn import functional as F

COMPARED = 64
"""Nearest samples of a query whose distances are compared exactly."""


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


def recall_at_1(embeddings: Tensor, labels: Tensor, queries: slice) -> Tensor:
    """Boolean: for each query among the embeddings (N, D), whether its nearest other sample has its label.

    Of equal ones the first counts. Those that a matrix product finds nearest are compared by their differences: among
    embeddings that nearly coincide it has few digits left.

    (Musgrave et al. 2020, A Metric Learning Reality Check, section 3.)
    """
    rows = torch.arange(*queries.indices(len(embeddings)), device=labels.device)
    distances = _squared_distances(embeddings[queries], embeddings)
    distances.scatter_(1, rows[:, None], torch.inf)
    near = distances.topk(min(COMPARED, len(embeddings)), dim=1, largest=False).indices.sort(dim=1).values
    x = _wide(embeddings)
    exact = torch.cdist(x[queries][:, None], x[near], compute_mode="donot_use_mm_for_euclid_dist")[:, 0]
    return _nearest_label(exact.masked_fill_(near == rows[:, None], torch.inf), labels[near]) == labels[queries]


def unit_length(embeddings: Tensor) -> Tensor:
    """Embeddings scaled to length 1, in float32 at least."""
    return F.normalize(_wide(embeddings), dim=1)


def _nearest_label(distances: Tensor, labels: Tensor) -> Tensor:
    """The label, (N, M) as the distances, of each row's nearest column; -1 where no distance is finite."""
    nearest = distances.argmin(dim=1, keepdim=True)
    found = distances.gather(1, nearest).isfinite()
    return torch.where(found, labels.gather(1, nearest), -1).squeeze(1)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, M), at least float32, with the mean of b taken off first for the digits' sake."""
    a, b = _wide(a), _wide(b)
    shift = b.mean(dim=0)
    a, b = a - shift, b - shift
    return torch.addmm(b.square().sum(dim=1), a, b.T, alpha=-2) + a.square().sum(dim=1, keepdim=True)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
