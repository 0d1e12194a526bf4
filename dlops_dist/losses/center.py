"""Centre loss and the centres' own update (Wen et al. 2016, A Discriminative Feature Learning Approach)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlops_dist.losses.terms import Terms, at_least_float32, checked_labels

CENTERS_AT_ONCE = 2**13


class CenterSums(NamedTuple):
    """What a batch says about the centres; sums over parts of the batch add up to those of the whole."""

    differences: Tensor
    """(C, D): for each class, the sum of c - x over its samples."""
    counts: Tensor
    """(C,): its number of samples."""


class CenterLoss(nn.Module):
    """Pulls embeddings x (N, D) towards their class centres c (C, D).

        L = 1/2 * 1/N sum_i ||x_i - c_yi||^2                               (eq. 2, as a mean)
        c_j <- c_j - alpha * sum_{i: y_i = j} (c_j - x_i) / (1 + n_j)      (eq. 4)

    The centres are a buffer, at least float32; they change in `update` alone, after the loss has used them.
    """

    reads, sees = "embeddings", "own"
    centers: Tensor

    def __init__(self, num_classes: int, embedding_dim: int, alpha: float = 0.5) -> None:
        super().__init__()
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], not {alpha}")
        self.alpha = alpha
        self.register_buffer("centers", torch.zeros(num_classes, embedding_dim))

    def terms(self, embeddings: Tensor, labels: Tensor) -> Terms:
        """Sum of 1/2 ||x_i - c_yi||^2 and N."""
        labels = checked_labels(labels, len(embeddings), len(self.centers))
        squares = F.mse_loss(at_least_float32(embeddings), self.centers[labels], reduction="sum")
        return Terms(squares / 2, len(labels))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.terms(embeddings, labels).mean()

    @torch.no_grad()
    def sums(self, embeddings: Tensor, labels: Tensor) -> CenterSums:
        """What `update` needs of a batch, or of a part of one. Same bits at each call, on every device."""
        labels = checked_labels(labels, len(embeddings), len(self.centers))
        differences = self.centers[labels] - embeddings.to(self.centers.dtype)
        sums, counts = torch.zeros_like(self.centers), self.centers.new_zeros(len(self.centers))
        return CenterSums(add_rows(sums, labels, differences), add_rows(counts, labels, counts.new_ones(len(labels))))

    @torch.no_grad()
    def update(self, sums: CenterSums) -> None:
        """Move the centres by the sums of the whole batch (eq. 4); classes without samples stay."""
        self.centers.addcdiv_(sums.differences, 1 + sums.counts[:, None], value=-self.alpha)

    @torch.no_grad()
    def move(self, embeddings: Tensor, labels: Tensor) -> None:
        """`update` by the `sums` of a whole batch, to the same bits, without a look at the classes that are not in it.

        Each sample finds the sums of its class where the first of that class would stand, were they sorted: nobody
        has to count the classes.
        """
        labels = checked_labels(labels, len(embeddings), len(self.centers))
        old, slots = self.centers[labels], torch.searchsorted(labels.sort().values, labels)
        sums = add_rows(torch.zeros_like(old), slots, old - embeddings.to(old.dtype))
        counts = add_rows(old.new_zeros(len(old)), slots, old.new_ones(len(old)))
        self.centers[labels] = old.addcdiv_(sums[slots], 1 + counts[slots, None], value=-self.alpha)

    def figures(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"center_spread": self.spread()}

    @torch.no_grad()
    def spread(self) -> Tensor:
        """Root of the centres' mean squared distance from their mean."""
        mean, parts = self.centers.mean(dim=0), self.centers.split(CENTERS_AT_ONCE)
        return torch.cat([(part - mean).square().sum(dim=1) for part in parts]).mean().sqrt()


def add_rows(sums: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """Add to the rows of `sums` (C, ...) that the labels (N,) name the rows (N, ...), in a fixed order.

    Of two operations each adds so on one kind of device alone, unless torch's algorithms are deterministic.
    """
    if sums.is_cpu:
        return sums.index_add_(0, labels, rows)
    return sums.index_put_((labels,), rows, accumulate=True)
