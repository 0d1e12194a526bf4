"""The one place that divides a loss: from each rank's terms to what it back-propagates and what everyone logs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlops_dist.distributed.collectives import all_sum, gather, world_size
from dlops_dist.losses import Terms
from dlops_dist.losses.terms import Count, at_least_one


class Objective(NamedTuple):
    """A step's loss, seen from one rank."""

    sums: list[Tensor]
    """Of this rank's terms, with gradient."""
    scales: list[Tensor]
    """Gradient of the step's loss with respect to each sum, times W: DDP averages over all ranks."""
    values: dict[str, Tensor]
    """Each loss over the global batch, float64, the same bits on every rank, without gradient."""

    def backward(self, *others: tuple[Tensor, Tensor]) -> None:
        """Back-propagate the sums, and with them other tensors by gradients that are known already.

        What only frozen weights have made is left out.
        """
        pairs = [*zip(self.sums, self.scales, strict=True), *others]
        tensors, gradients = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
        torch.autograd.backward(tensors, gradients)


def global_objective(terms: Mapping[str, Terms], weights: Mapping[str, float], share: float = 1.0) -> Objective:
    """Losses over the global batch from this rank's share of their terms.

    With S_r this rank's sum, n_r its count, W ranks and N = max(sum_r n_r, 1):

        back-propagate  share sum_k w_k W S_kr / N_k        log  share sum_r S_kr / N_k

    The average of DDP takes the W away: what remains is the gradient of the loss over all ranks' samples, for
    parts of any size. One all-reduce of 2 numbers for each loss.

    `share` is 1, or this micro-batch's part of a step's samples: objectives then add up to that of the step, for
    losses that count samples. (Triplets do not: mine them over the whole step.)
    """
    sums, scales, values = [], [], {}
    for (name, t), (total, count) in zip(terms.items(), _over_all_ranks(terms), strict=True):
        part = share / at_least_one(count)
        sums.append(t.sum)
        scales.append(_filled_like(t.sum, weights[name] * world_size() * part))
        values[name] = total * part
    return Objective(sums, scales, values)


def _filled_like(x: Tensor, value: float | Tensor) -> Tensor:
    return value.to(x) if isinstance(value, Tensor) else torch.full_like(x, value)


def _over_all_ranks(terms: Mapping[str, Terms]) -> list[tuple[Tensor, Count]]:
    """Sum, float64, and count of each loss."""
    own: list[tuple[Tensor, Count]] = [(t.sum.detach().double(), t.count) for t in terms.values()]
    if world_size() == 1:
        return own
    pairs = [torch.stack([total, _filled_like(total, count)]) for total, count in own]
    return [(total, count) for total, count in all_sum(torch.stack(pairs))]


def update_state(loss: Any, outputs: Tensor, labels: Tensor, sizes: Sequence[int]) -> None:
    """Move a loss's state, its centres say, by the whole global batch: the same bits on every rank.

    Args:
        loss: has `update`, and `sums`, which gives tensors (C, ...), a row for each class.
        outputs: (n, D) of this rank.
        labels: (n,) of this rank.
        sizes: n of each rank.

    Sums of all classes are all-reduced; where classes outnumber the batch, the samples are gathered instead,
    so that the bytes grow with the batch and not with the classes.
    """
    outputs = outputs.detach()
    if max(map(len, loss.buffers())) > sum(sizes):
        loss.update(loss.sums(gather(outputs, sizes), gather(labels, sizes)))
        return
    own = loss.sums(outputs, labels)
    if world_size() > 1:
        flat = [part.flatten(1) if part.ndim > 1 else part[:, None] for part in own]
        total = all_sum(torch.cat(flat, dim=1)).split([part.shape[1] for part in flat], dim=1)
        own = type(own)(*(part.view_as(like) for part, like in zip(total, own, strict=True)))
    loss.update(own)
