"""Triplet loss: given triplets, or triplets mined within a batch (batch-hard, semi-hard, all)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlops_dist.losses.mining import Classes, ClassMates, Nearness, Triplets, by_rows, chunk_elements, mined, on_gpu
from dlops_dist.losses.terms import Terms, at_least_float32, checked_labels, nan_unless_finite

Mining = Literal["batch-hard", "semi-hard", "all"]
Piece = Callable[[Tensor], tuple[Tensor, Tensor]]
LEAST_LENGTH = 1e-6  # that an embedding is divided by


class TripletLoss(nn.Module):
    """Each anchor a nearer to its positive p than to its negative n, by a margin.

        l(a, p, n) = max(d(a, p) - d(a, n) + margin, 0),    L = sum l / number of triplets

    d is the Euclidean distance, of L2-normalised embeddings unless `normalize=False`, squared if `squared`.
    Mining picks the triplets of a batch, for each anchor:
        batch-hard: the farthest positive, the nearest negative (Hermans et al. 2017, eq. 5);
        semi-hard:  every positive, with the nearest negative that is farther than it, else the farthest
                    negative (Schroff et al. 2015, section 3.2);
        all:        every positive with every negative (Hermans et al. 2017, eq. 6).
    `average` divides by all those triplets ("valid") or by those whose loss is above 0 ("active").
    Of equal distances the one with the lowest index is picked. Memory is O(N D), N x N only in chunks.
    Where an embedding is NaN or infinite, the loss and all its gradients are NaN. Normalising divides by a length of at
    least 1e-6, so the gradient of a shorter embedding, 0 among them, is at most 1e6 times that of a direction.
    """

    reads, sees = "embeddings", "all"

    def __init__(
        self,
        margin: float = 0.5,
        mining: Mining = "batch-hard",
        normalize: bool = True,
        squared: bool = False,
        average: Literal["valid", "active"] = "valid",
    ) -> None:
        super().__init__()
        if not margin >= 0:
            raise ValueError(f"margin must be at least 0, not {margin}")
        if mining not in ("batch-hard", "semi-hard", "all"):
            raise ValueError(f"mining must be 'batch-hard', 'semi-hard' or 'all', not {mining!r}")
        if average not in ("valid", "active"):
            raise ValueError(f"average must be 'valid' or 'active', not {average!r}")
        self.margin, self.mining, self.normalize = margin, mining, normalize
        self.squared, self.average = squared, average

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of one batch: embeddings (N, D), labels (N,). 0 where the batch has no triplet."""
        return self.terms(embeddings, labels).mean()

    def from_triplets(self, anchors: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        """The loss of given triplets, the study's form: three tensors (T, D), row by row."""
        if not anchors.shape == positives.shape == negatives.shape:
            shapes = [tuple(x.shape) for x in (anchors, positives, negatives)]
            raise ValueError(f"anchors, positives and negatives must be of one shape, not {shapes}")
        anchors, positives, negatives = (self._prepared(x) for x in (anchors, positives, negatives))
        differences = self._distance(anchors, positives) - self._distance(anchors, negatives)
        return Terms(*self._hinges(differences, torch.ones_like(differences, dtype=torch.bool))).mean()

    def terms(
        self, embeddings: Tensor, labels: Tensor, anchors: slice | None = None, largest_class: int | None = None,
        shared: "Shared | None" = None,
    ) -> Terms:  # fmt: skip
        """Sum and number of the triplets whose anchor is in `anchors` (default all), mined among all N samples.

        Pass the embeddings of all ranks, gathered with gradient, and a rank's own slice: the ranks' terms
        add up to those of one process.

        Args:
            largest_class: number of samples with the most frequent label. Where it is given, nothing here waits for a
                GPU.
            shared: of the same embeddings, where it is at hand.
        """
        labels = checked_labels(labels, len(embeddings))
        first, last, _ = (anchors or slice(None)).indices(len(embeddings))
        if largest_class is None:
            largest_class = int(labels.unique(return_counts=True)[1].max()) if len(labels) else 0
        zero, nearness = shared or self.shared(embeddings, labels)
        with torch.autocast(embeddings.device.type, enabled=False):
            classes = Classes(labels, largest_class)
            chunks = classes.mates(first, last)
            if self.mining == "all" or nearness is None:
                pieces: Iterable[Piece] = (partial(self._all_of_rows, mates=mates) for mates in chunks)
            else:
                found: Iterable[Triplets] = mined(nearness, classes, chunks, self.mining)
                if not on_gpu(embeddings) and zero == 0:
                    embeddings, found = _only_rows_of(list(found), embeddings)
                pieces = self._pieces(embeddings, found)
            return Terms(*_ChunkedSum.apply(self._prepared(embeddings), zero, pieces))

    @torch.no_grad()
    def shared(self, embeddings: Tensor, labels: Tensor) -> "Shared":
        """What the anchors of all blocks of a batch have in common."""
        with torch.autocast(embeddings.device.type, enabled=False):
            x = at_least_float32(embeddings.detach())
            zero = nan_unless_finite(x) if on_gpu(x) else by_rows(lambda part: (part * 0).sum(dim=1), x).sum()
            return Shared(zero, None if self.mining == "all" else Nearness(self._prepared(x)))

    def hints(self, labels: np.ndarray) -> dict[str, int]:
        """What `terms` is told of the labels (N,), which are on the host too."""
        return {"largest_class": int(np.unique(labels, return_counts=True)[1].max(initial=0))}

    def defined(self, labels: np.ndarray) -> bool:
        """Whether samples of these labels hold an anchor with a positive and a negative."""
        return 1 < self.hints(labels)["largest_class"] < len(labels)

    def figures(self, embeddings: Tensor, labels: Tensor, largest_class: int | None = None) -> dict[str, Tensor]:
        return {"active_triplets": self.active_share(embeddings, labels, largest_class)}

    @torch.no_grad()
    def active_share(self, embeddings: Tensor, labels: Tensor, largest_class: int | None = None) -> Tensor:
        """The part of a batch's triplets whose loss is above 0, float64; NaN where there are none."""
        loss = TripletLoss(self.margin, self.mining, self.normalize, self.squared, average="active")
        active = loss.terms(embeddings, labels, None, largest_class).count
        ordered = labels.sort().values
        first, end = (torch.searchsorted(ordered, labels, right=right) for right in (False, True))
        positives, negatives = (end - first - 1).double(), (len(labels) - (end - first)).double()
        valid = positives.clamp(max=1) if self.mining == "batch-hard" else positives
        return active / (valid * (negatives if self.mining == "all" else negatives.clamp(max=1))).sum()

    def _prepared(self, embeddings: Tensor) -> Tensor:
        embeddings = at_least_float32(embeddings)
        return F.normalize(embeddings, dim=1, eps=LEAST_LENGTH) if self.normalize else embeddings

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Of rows, by direct difference; its gradient at distance 0 is 0."""
        return (a - b).square().sum(dim=-1) if self.squared else torch.linalg.vector_norm(a - b, dim=-1)

    def _hinges(self, differences: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        losses = F.relu(differences + self.margin) * valid
        counted = losses > 0 if self.average == "active" else valid
        return losses.sum(), counted.sum(dtype=torch.float64)

    def _pieces(self, x: Tensor, found: Iterable[Triplets]) -> Iterator[Piece]:
        """Parts of the sum over some triplets, each a function of the embeddings."""
        size = max(1, chunk_elements(x) // (2 * x.shape[1]))
        for triplets in found:
            for part in zip(*(column.split(size, dim=-1) for column in triplets), strict=True):
                yield partial(self._of_triplets, triplets=Triplets(*part))

    def _of_triplets(self, x: Tensor, triplets: Triplets) -> tuple[Tensor, Tensor]:
        anchors, others = F.embedding(triplets.anchors, x), F.embedding(triplets.others, x)  # x[index], but faster
        near, far = self._distance(anchors, others)
        return self._hinges(near - far, triplets.valid)

    def _all_of_rows(self, x: Tensor, mates: ClassMates) -> tuple[Tensor, Tensor]:
        """Every triplet of some anchors, without a cube: sort the negatives, then add up prefix sums."""
        distances = torch.cdist(x[mates.rows], x, compute_mode="donot_use_mm_for_euclid_dist")
        if self.squared:
            distances = distances.square()
        positive = distances.gather(1, mates.members)
        far = distances.scatter(1, mates.members, torch.inf).sort(dim=1).values
        reach = positive.detach() + self.margin
        active = torch.searchsorted(far.detach(), reach)  # negatives nearer than positive + margin
        far = far.masked_fill(far.isinf(), 0.0).double()
        prefix = F.pad(_prefix_sums(far) if on_gpu(far) else far.cumsum(dim=1), (1, 0))
        losses = active * (positive.double() + self.margin) - prefix.gather(1, active)
        number = active if self.average == "active" else mates.num_negatives[:, None].expand_as(active)
        total = losses.masked_fill(~mates.is_positive, 0.0).sum().to(x.dtype)
        return total, number.masked_fill(~mates.is_positive, 0).sum(dtype=torch.float64)


class Shared(NamedTuple):
    """What the anchors of all blocks have in common."""

    zero: Tensor
    """0; NaN where an embedding is NaN or infinite."""
    nearness: Nearness | None
    """Where triplets are picked."""


def _only_rows_of(found: Sequence[Triplets], embeddings: Tensor) -> tuple[Tensor, Sequence[Triplets]]:
    """Those embeddings that some triplets are made of, and the triplets as places among them: one rank's triplets are
    made of few of a large batch, and to differentiate the rest of it, all zeros, takes longer than to mine.
    """
    wanted = torch.zeros(len(embeddings), dtype=torch.bool)
    for triplets in found:
        wanted[triplets.anchors] = True
        wanted[triplets.others] = True
    rows, place = wanted.nonzero()[:, 0], wanted.cumsum(dim=0) - 1
    if len(rows) == len(embeddings):
        return embeddings, found
    return F.embedding(rows, embeddings), [Triplets(place[t.anchors], place[t.others], t.valid) for t in found]


class _ChunkedSum(torch.autograd.Function):
    """Sum and count of pieces, f(x) = sum of f_k(x), with their gradient taken piece by piece in the forward pass.

    What is kept for the backward pass is one tensor of the shape of x, however many triplets there are.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, zero: Tensor, pieces: Iterable[Piece]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        total, count = zero.clone(), x.new_zeros((), dtype=torch.float64)
        gradient = torch.zeros_like(x).add_(total) if ctx.needs_input_grad[0] else None
        for piece in pieces:
            leaf = x.detach().requires_grad_(gradient is not None)
            with torch.enable_grad():
                piece_total, piece_count = piece(leaf)
            if gradient is not None:
                gradient += torch.autograd.grad(piece_total, leaf)[0]
            total += piece_total.detach()
            count += piece_count
        ctx.gradient = gradient
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, _: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return d_total * ctx.gradient, None, None


def _prefix_sums(x: Tensor) -> Tensor:
    """`cumsum` of each row (R, N), which torch 2.11 refuses on a GPU under deterministic algorithms."""
    step = 1
    while step < x.shape[1]:
        x = x + F.pad(x[:, :-step], (step, 0))
        step *= 2
    return x
