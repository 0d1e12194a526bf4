"""Triplet loss: given triplets, or triplets mined within a batch (batch-hard, semi-hard, all)."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlops_dist.losses.terms import Terms, at_least_float32, checked_labels, nan_unless_finite

Mining = Literal["batch-hard", "semi-hard", "all"]
Piece = Callable[[Tensor], tuple[Tensor, Tensor]]
WEYL = 0x9E3779B97F4A7C15 - 2**64  # odd, and far from a pattern of bits
COMPARED = 64  # samples of a class whose distances from an anchor are compared exactly
LEAST_LENGTH = 1e-6  # that an embedding is divided by
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
    Where an embedding is NaN or infinite, the loss and all its gradients are NaN. Normalising divides by a length of at
    least 1e-6, so the gradient of a shorter embedding, 0 among them, is at most 1e6 times that of a direction.
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
        self, embeddings: Tensor, labels: Tensor, anchors: slice | None = None, largest_class: int | None = None
    ) -> Terms:
        """Sum and number of the triplets whose anchor is in `anchors` (default all), mined among all N samples.

        Pass the embeddings of all ranks, gathered with gradient, and a rank's own slice: the ranks' terms
        add up to those of one process.

        Args:
            largest_class: number of samples with the most frequent label. Where it is given, nothing here waits for a
                GPU.
        """
        labels = checked_labels(labels, len(embeddings))
        first, last, _ = (anchors or slice(None)).indices(len(embeddings))
        if largest_class is None:
            largest_class = int(labels.unique(return_counts=True)[1].max()) if len(labels) else 0
        with torch.autocast(embeddings.device.type, enabled=False):
            x = self._prepared(embeddings)
            classes = _Classes(labels, largest_class)
            return Terms(*_ChunkedSum.apply(x, self._pieces(x.detach(), classes, classes.mates(first, last))))

    def _prepared(self, embeddings: Tensor) -> Tensor:
        embeddings = at_least_float32(embeddings)
        return F.normalize(embeddings, dim=1, eps=LEAST_LENGTH) if self.normalize else embeddings

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Row-wise distance, by direct difference; its gradient at distance 0 is 0."""
        squared = (a - b).square().sum(dim=1)
        return squared if self.squared else _safe_sqrt(squared)

    def _hinges(self, differences: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        losses = F.relu(differences + self.margin) * valid
        counted = losses > 0 if self.average == "active" else valid
        return losses.sum(), counted.sum(dtype=torch.float64)

    def _pieces(self, x: Tensor, classes: "_Classes", chunks: Iterator["_ClassMates"]) -> Iterator[Piece]:
        """Parts of the sum, each a function of the embeddings."""
        if self.mining == "all":
            yield from (partial(self._all_of_rows, mates=mates) for mates in chunks)
            return
        ranked = _ranked(x, chunks)
        if self.mining == "batch-hard":
            picked = [_batch_hard(x, classes, mates, nearness) for mates, nearness in ranked]
        else:
            picked = [_semi_hard(mates, nearness) for mates, nearness in ranked]
        size = max(1, CHUNK_ELEMENTS // x.shape[1])
        columns = [torch.cat(parts).split(size) for parts in zip(*picked, strict=True)]
        for triplets in zip(*columns, strict=True):
            yield partial(self._of_triplets, triplets=_Triplets(*triplets))

    def _of_triplets(self, x: Tensor, triplets: "_Triplets") -> tuple[Tensor, Tensor]:
        *indices, valid = triplets
        anchors, positives, negatives = (F.embedding(index, x) for index in indices)  # x[index], its gradient faster
        return self._hinges(self._distance(anchors, positives) - self._distance(anchors, negatives), valid)

    def _all_of_rows(self, x: Tensor, mates: "_ClassMates") -> tuple[Tensor, Tensor]:
        """Every triplet of some anchors, without a cube: sort the negatives, then add up prefix sums."""
        distances = torch.cdist(x[mates.rows], x, compute_mode="donot_use_mm_for_euclid_dist")
        if self.squared:
            distances = distances.square()
        positive = distances.gather(1, mates.members)
        far = distances.scatter(1, mates.members, torch.inf).sort(dim=1).values
        reach = positive.detach() + self.margin
        active = torch.searchsorted(far.detach(), reach)  # negatives nearer than positive + margin
        far = far.masked_fill(far.isinf(), 0.0).double()
        prefix = F.pad(_prefix_sums(far) if far.is_cuda else far.cumsum(dim=1), (1, 0))
        losses = active * (positive.double() + self.margin) - prefix.gather(1, active)
        number = active if self.average == "active" else mates.num_negatives[:, None].expand_as(active)
        total = losses.masked_fill(~mates.is_positive, 0.0).sum().to(x.dtype)
        return total, number.masked_fill(~mates.is_positive, 0).sum(dtype=torch.float64)


class _ChunkedSum(torch.autograd.Function):
    """Sum and count of pieces, f(x) = sum of f_k(x), with their gradient taken piece by piece in the forward pass.

    What is kept for the backward pass is one tensor of the shape of x, however many triplets there are.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, pieces: Iterator[Piece]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        total, count = nan_unless_finite(x), x.new_zeros((), dtype=torch.float64)
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
    def backward(ctx: Any, d_total: Tensor, _: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return d_total * ctx.gradient, None


def _prefix_sums(x: Tensor) -> Tensor:
    """`cumsum` of each row (R, N), which torch 2.11 refuses on a GPU under deterministic algorithms."""
    step = 1
    while step < x.shape[1]:
        x = x + F.pad(x[:, :-step], (step, 0))
        step *= 2
    return x


def _safe_sqrt(squared: Tensor) -> Tensor:
    """sqrt, with gradient 0 instead of infinity at 0."""
    some = squared != 0  # NaN too
    return torch.where(some, squared, 1.0).sqrt() * some


class _ClassMates(NamedTuple):
    """R anchors, and the samples of their classes: at most M of a class, and never an R x N mask."""

    rows: Tensor
    """(R,) the anchors' indices."""
    members: Tensor
    """(R, M) indices of the samples of the anchor's class, ascending, itself among them; the last is repeated."""
    is_positive: Tensor
    """(R, M) neither the anchor nor a repetition."""
    num_negatives: Tensor
    """(R,) number of samples of other classes."""


class _Triplets(NamedTuple):
    """T rows, of which some may be none: to leave those out would make a GPU wait until they are counted."""

    anchors: Tensor
    positives: Tensor
    negatives: Tensor
    """(T,) indices."""
    valid: Tensor
    """(T,) whether the row is a triplet."""


class _Classes:
    """The samples of each class of a batch, of which the largest class has so many."""

    def __init__(self, labels: Tensor, largest_class: int) -> None:
        self._labels, self._largest = labels, largest_class
        self._by_class = labels.argsort(stable=True)
        self._ordered = labels[self._by_class]

    def members(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For rows (R,): indices (R, M) of the samples of their classes, ascending; which are no repetition of the last
        one, (R, M); how many these are, (R,)."""
        labels = self._labels[rows]
        start = torch.searchsorted(self._ordered, labels)[:, None]
        end = torch.searchsorted(self._ordered, labels, right=True)[:, None]
        place = start + torch.arange(self._largest, device=labels.device)
        return self._by_class[place.minimum(end - 1)], place < end, (end - start)[:, 0]

    def mates(self, first: int, last: int) -> Iterator[_ClassMates]:
        """Of the anchors from first to last, in chunks of CHUNK_ELEMENTS / N."""
        num_samples = len(self._labels)
        size = max(1, CHUNK_ELEMENTS // max(1, num_samples))
        for rows in torch.arange(first, last, device=self._labels.device).split(size) if last > first else ():
            members, is_first, number = self.members(rows)
            yield _ClassMates(rows, members, is_first & (members != rows[:, None]), num_samples - number)


@torch.no_grad()
def _batch_hard(x: Tensor, classes: _Classes, mates: _ClassMates, nearness: Tensor) -> _Triplets:
    """One triplet for each row. Overwrites `nearness`.

    In a tight class `nearness` has few digits left: the positives, and the nearest negative with its class, are
    compared by their differences.
    """
    rows = mates.rows
    positives = _at_the_end(x, rows, mates.members, mates.is_positive, nearness)
    nearest = nearness.scatter_(1, mates.members, torch.inf).argmin(dim=1)
    members, is_first, _ = classes.members(nearest)
    negatives = _at_the_end(x, rows, members, is_first, nearness, nearest=True)
    return _Triplets(rows, positives, negatives, mates.is_positive.any(dim=1) & (mates.num_negatives > 0))


def _at_the_end(
    x: Tensor, rows: Tensor, candidates: Tensor, wanted: Tensor, nearness: Tensor, nearest: bool = False
) -> Tensor:
    """(R,) of each row's candidates (R, M), the wanted one that is farthest from it, or nearest; the first of equals.

    Of more than COMPARED candidates, those that `nearness` puts at that end.
    """
    sign = -1 if nearest else 1
    if candidates.shape[1] > COMPARED:
        score = (sign * nearness.gather(1, candidates)).masked_fill_(~wanted, -torch.inf)
        place = score.topk(COMPARED, dim=1).indices.sort(dim=1).values
        candidates, wanted = candidates.gather(1, place), wanted.gather(1, place)
    size = max(1, CHUNK_ELEMENTS // max(1, candidates.shape[1] * x.shape[1]))
    parts = zip(rows.split(size), candidates.split(size), strict=True)
    exact = [torch.cdist(x[a][:, None], x[b], compute_mode="donot_use_mm_for_euclid_dist")[:, 0] for a, b in parts]
    end = (sign * torch.cat(exact)).masked_fill_(~wanted, -torch.inf).argmax(dim=1, keepdim=True)
    return candidates.gather(1, end)[:, 0]


@torch.no_grad()
def _semi_hard(mates: _ClassMates, nearness: Tensor) -> _Triplets:
    """One triplet for each positive pair of a row."""
    ordered, index = nearness.scatter(1, mates.members, torch.inf).sort(dim=1, stable=True)
    # the first negative that is farther than the positive
    place = torch.searchsorted(ordered, nearness.gather(1, mates.members), right=True)
    nearest_farther = index.gather(1, place.clamp(max=nearness.shape[1] - 1))
    farthest = nearness.scatter(1, mates.members, -torch.inf).argmax(dim=1, keepdim=True)
    negatives = torch.where(place < mates.num_negatives[:, None], nearest_farther, farthest)
    valid = mates.is_positive & (mates.num_negatives[:, None] > 0)
    anchors = mates.rows[:, None].expand_as(mates.members)
    return _Triplets(anchors.flatten(), mates.members.flatten(), negatives.flatten(), valid.flatten())


@torch.no_grad()
def _ranked(x: Tensor, chunks: Iterator[_ClassMates]) -> Iterator[tuple[_ClassMates, Tensor]]:
    """Each chunk of anchors a with what orders all samples b by their distance from it, (R, N): ||b||^2 - 2ab.

    That is the squared distance less ||a||^2. The mean is taken off first: it loses all digits where the embeddings
    nearly coincide. A matrix product may round equal columns differently: those of equal samples are made equal again.
    """
    original = _first_equal(x)
    repeated = _may_repeat(original)
    x = x - x.mean(dim=0)
    norms = x.square().sum(dim=1)
    for mates in chunks:
        rows = mates.rows
        nearness = torch.addmm(norms, x[rows], x.T, alpha=-2)
        if repeated:
            equal = original[rows][:, None] == original
            nearness = torch.where(equal, -norms[rows, None], nearness[:, original])
        yield mates, nearness


def _may_repeat(original: Tensor) -> bool:
    """Whether there are equal samples; always on a GPU, which a look at it would make wait."""
    return original.is_cuda or bool((original != torch.arange(len(original))).any())


def _first_equal(x: Tensor) -> Tensor:
    """For each row of x (N, D), the lowest index of a row with the same bits, (N,)."""
    bits = x.contiguous().view(torch.int64 if x.dtype == torch.float64 else torch.int32).long()
    factors = torch.arange(1, x.shape[1] + 1, device=x.device) * WEYL
    factors = (factors ^ (factors >> 29)) * WEYL | 1
    hashes = (bits * factors).sum(dim=1)  # integers: no order of summation matters
    ordered, index = hashes.sort(stable=True)
    lowest = index[torch.searchsorted(ordered, hashes)]  # the first of equal hashes
    return torch.where((bits == bits[lowest]).all(dim=1), lowest, torch.arange(len(x), device=x.device))
