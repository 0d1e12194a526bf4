"""Triplet loss: given triplets, or triplets mined within a batch (batch-hard, semi-hard, all)."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dlops_dist.losses.terms import Terms, at_least_float32

Mining = Literal["batch-hard", "semi-hard", "all"]
CHUNK_ELEMENTS = 2**21  # of a distance matrix held at once: 8 MB in float32


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
    """

    def __init__(
        self,
        margin: float = 0.5,
        mining: Mining = "batch-hard",
        normalize: bool = True,
        squared: bool = False,
        average: Literal["valid", "active"] = "valid",
    ) -> None:
        super().__init__()
        if margin < 0:
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
        anchors, positives, negatives = (self._prepared(x) for x in (anchors, positives, negatives))
        return self._hinge_terms(self._distance(anchors, positives) - self._distance(anchors, negatives)).mean()

    def terms(self, embeddings: Tensor, labels: Tensor, anchors: slice | None = None) -> Terms:
        """Sum and number of the triplets whose anchor is in `anchors` (default all), mined among all N samples.

        Pass the embeddings of all ranks, gathered with gradient, and a rank's own slice: the ranks' terms
        add up to those of one process.
        """
        first, last, _ = (anchors or slice(None)).indices(len(embeddings))
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = self._prepared(embeddings)
            if self.mining == "all":
                return self._all_terms(embeddings, labels, first, last)
            mine = self._mine_batch_hard if self.mining == "batch-hard" else self._mine_semi_hard
            anchor, positive, negative = mine(embeddings.detach(), labels, first, last)
            anchor_x = embeddings[anchor]
            near = self._distance(anchor_x, embeddings[positive])
            far = self._distance(anchor_x, embeddings[negative])
            terms = self._hinge_terms(near - far)
            # a rank without triplets still takes part in the backward pass of the gather
            return Terms(terms.sum + 0 * embeddings.sum(), terms.count)

    def _prepared(self, embeddings: Tensor) -> Tensor:
        embeddings = at_least_float32(embeddings)
        return F.normalize(embeddings, dim=1) if self.normalize else embeddings

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Row-wise distance, by direct difference; its gradient at distance 0 is 0."""
        squared = (a - b).square().sum(dim=1)
        return squared if self.squared else _safe_sqrt(squared)

    def _hinge_terms(self, differences: Tensor) -> Terms:
        losses = F.relu(differences + self.margin)
        chosen = losses > 0 if self.average == "active" else torch.ones_like(losses, dtype=torch.bool)
        return Terms(losses.sum(), chosen.sum(dtype=torch.float64))

    @torch.no_grad()
    def _mine_batch_hard(self, x: Tensor, labels: Tensor, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        picks = []
        for rows, squared, same in _chunks(x, labels, first, last):
            other = ~same
            positives = same.clone()
            positives[torch.arange(len(rows), device=x.device), rows] = False
            positive = squared.masked_fill(~positives, -torch.inf).argmax(dim=1)
            negative = squared.masked_fill(same, torch.inf).argmin(dim=1)
            valid = positives.any(dim=1) & other.any(dim=1)
            picks.append(torch.stack([rows, positive, negative])[:, valid])
        return _split_triplets(picks, x)

    @torch.no_grad()
    def _mine_semi_hard(self, x: Tensor, labels: Tensor, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        picks = []
        for rows, squared, same in _chunks(x, labels, first, last):
            num_negatives = (~same).sum(dim=1, keepdim=True)
            ordered, index = squared.masked_fill(same, torch.inf).sort(dim=1, stable=True)
            place = torch.searchsorted(ordered, squared, right=True)  # of the first negative that is farther
            place = place.clamp(max=(num_negatives - 1).clamp(min=0))
            negatives = index.gather(1, place)
            positives = same & (num_negatives > 0)
            positives[torch.arange(len(rows), device=x.device), rows] = False
            row, positive = positives.nonzero(as_tuple=True)
            picks.append(torch.stack([rows[row], positive, negatives[row, positive]]))
        return _split_triplets(picks, x)

    def _all_terms(self, x: Tensor, labels: Tensor, first: int, last: int) -> Terms:
        total, count = 0 * x.sum(), torch.zeros((), dtype=torch.float64, device=x.device)
        for rows in _row_chunks(x, first, last):
            chunk_total, chunk_count = checkpoint(self._all_of_rows, x, labels, rows, use_reentrant=False)
            total, count = total + chunk_total, count + chunk_count
        return Terms(total, count)

    def _all_of_rows(self, x: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Every triplet of some anchors, without a cube: sort the negatives, then add up prefix sums."""
        distances = torch.cdist(x[rows], x, compute_mode="donot_use_mm_for_euclid_dist")
        if self.squared:
            distances = distances.square()
        same = labels[rows][:, None] == labels
        positives = same.scatter(1, rows[:, None], False)
        far = distances.masked_fill(same, torch.inf).sort(dim=1).values
        reach = distances.detach() + self.margin
        active = torch.searchsorted(far.detach(), reach)  # negatives nearer than positive + margin
        far = far.masked_fill(far.isinf(), 0.0).double()
        prefix = F.pad(far.cumsum(dim=1), (1, 0))
        losses = active * (distances.double() + self.margin) - prefix.gather(1, active)
        num_negatives = (~same).sum(dim=1, keepdim=True).expand_as(active)
        number = active if self.average == "active" else num_negatives
        total = losses.masked_fill(~positives, 0.0).sum().to(x.dtype)
        return total, number.masked_fill(~positives, 0).sum(dtype=torch.float64)


def _safe_sqrt(squared: Tensor) -> Tensor:
    """sqrt, with gradient 0 instead of infinity at 0."""
    positive = squared > 0
    return torch.where(positive, squared, 1.0).sqrt() * positive


def _row_chunks(x: Tensor, first: int, last: int) -> Iterator[Tensor]:
    size = max(1, CHUNK_ELEMENTS // max(1, len(x)))
    for start in range(first, last, size):
        yield torch.arange(start, min(start + size, last), device=x.device)


def _chunks(x: Tensor, labels: Tensor, first: int, last: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows, their squared distances (rows, N) to all samples, and where the labels are equal, chunk by chunk.

    The mean is taken off first: ||a||^2 + ||b||^2 - 2ab loses all digits where the embeddings nearly coincide.
    """
    x = x - x.mean(dim=0)
    norms = x.square().sum(dim=1)
    for rows in _row_chunks(x, first, last):
        squared = torch.addmm(norms, x[rows], x.T, alpha=-2).add_(norms[rows, None]).clamp_(min=0)
        yield rows, squared, labels[rows, None] == labels


def _split_triplets(picks: list[Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    triplets = torch.cat([torch.zeros(3, 0, dtype=torch.int64, device=x.device), *picks], dim=1)
    return triplets[0], triplets[1], triplets[2]
