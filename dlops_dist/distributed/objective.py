"""The one place that divides a loss: from each block's terms to what is back-propagated and what everyone logs."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dlops_dist.distributed.collectives import world_size
from dlops_dist.distributed.tree import Blocks, tree_sum
from dlops_dist.losses import Terms
from dlops_dist.losses.terms import Count, at_least_one


class Objective(NamedTuple):
    """A step's loss, seen from one rank."""

    sums: list[Tensor]
    """Of each loss's terms in this rank's blocks, with gradient; those of one block after the other."""
    scales: dict[str, Tensor]
    """Gradient of the step's loss with respect to each loss's sum, of any block."""
    values: dict[str, Tensor]
    """Each loss over the global batch, float64, the same bits on every rank, without gradient."""

    def backward(self) -> None:
        """Back-propagate under DDP, whose average over ranks is then the gradient of the step's loss."""
        scales = [scale * world_size() for scale in self.scales.values()]
        torch.autograd.backward(self.sums, scales * (len(self.sums) // len(scales)))


def global_objective(terms: Mapping[str, Terms], weights: Mapping[str, float]) -> Objective:
    """Losses over the global batch from this rank's share of their terms, which is then a block of its own."""
    return objective_of_blocks([terms], weights, Blocks())


def objective_of_blocks(
    terms: Sequence[Mapping[str, Terms]], weights: Mapping[str, float], blocks: Blocks, share: float = 1.0
) -> Objective:
    """Losses over the global batch from the terms of this rank's blocks.

    With S_b a block's sum, n_b its count, and N = max(sum_b n_b, 1):

        back-propagate  share sum_k w_k S_kb / N_k        log  share sum_b S_kb / N_k

    The gradients of all blocks then add up to that of the loss over all their samples, for blocks of any size. One
    gather of 2 numbers for each block and loss.

    `share` is 1, or this micro-batch's part of a step's samples: objectives then add up to that of the step, for
    losses that count samples. (Triplets do not: mine them over the whole step.)
    """
    scales, values = {}, {}
    for name, (total, count) in _over_all_blocks(terms, blocks).items():
        part = share / at_least_one(count)
        scales[name] = _filled_like(terms[0][name].sum.detach(), weights[name] * part)
        values[name] = total * part
    return Objective([t.sum for own in terms for t in own.values()], scales, values)


def _filled_like(x: Tensor, value: float | Tensor) -> Tensor:
    return value.to(x) if isinstance(value, Tensor) else torch.full_like(x, value)


def _over_all_blocks(terms: Sequence[Mapping[str, Terms]], blocks: Blocks) -> dict[str, tuple[Tensor, Count]]:
    """Sum, float64, and count of each loss."""
    of_blocks = [{name: (t.sum.detach().double(), t.count) for name, t in own.items()} for own in terms]
    if blocks.number == 1 or not of_blocks[0]:
        return dict(of_blocks[0])
    pairs = [torch.stack([total, _filled_like(total, count)]) for own in of_blocks for total, count in own.values()]
    rows = torch.stack(pairs).view(len(of_blocks), -1, 2)
    totals = tree_sum(blocks.of_all(rows))
    return {name: (total, count) for name, (total, count) in zip(of_blocks[0], totals, strict=True)}
