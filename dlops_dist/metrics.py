"""Sums and counts that add up over samples: top-k, class-wise, nearest centre, Recall@1."""

import torch
from torch import Tensor
from torch.nn import functional as F


def rank_of_label(logits: Tensor, labels: Tensor) -> Tensor:
    """For each row of logits (N, C), how many classes come before its label (0: the label is the top one).

    Of equal logits the lower class comes first, so the rank is exact and the same on every device. A row with
    a NaN counts as a miss.
    """
    own = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=logits.device)
    before = (logits > own) | ((logits == own) & (classes < labels[:, None]))
    return torch.where(logits.isnan().any(dim=1), logits.shape[1], before.sum(dim=1))


def topk_correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Boolean (N,): whether the label is among the k largest logits."""
    return rank_of_label(logits, labels) < k


def per_class(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Sum of values (N,) for each class, float64 (C,)."""
    return torch.bincount(labels, weights=values.double(), minlength=num_classes)


def nearest_center_correct(embeddings: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """Boolean (N,): whether the nearest of centers (C, D) is the label's (Euclidean). A NaN centre is never nearest."""
    distances = _squared_distances(embeddings, centers).nan_to_num(nan=torch.inf)
    return distances.argmin(dim=1) == labels


def recall_at_1(queries: Tensor, own_index: Tensor, query_labels: Tensor, gallery: Tensor, labels: Tensor) -> Tensor:
    """Boolean (Q,): whether a query's nearest other sample of the gallery (N, D) has its label.

    own_index (Q,) is where each query itself stands in the gallery (Musgrave et al. 2020, section 3).
    """
    distances = _squared_distances(queries, gallery)
    distances.scatter_(1, own_index[:, None], torch.inf)
    return labels[distances.argmin(dim=1)] == query_labels


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, M), at least float32, with the mean of b taken off first for the digits' sake."""
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    a, b = a.to(dtype), b.to(dtype)
    shift = b.nanmean(dim=0)
    a, b = a - shift, b - shift
    return torch.addmm(b.square().sum(dim=1), a, b.T, alpha=-2) + a.square().sum(dim=1, keepdim=True)


def unit_length(embeddings: Tensor) -> Tensor:
    """Embeddings scaled to length 1, in float32 at least."""
    return F.normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), dim=1)
