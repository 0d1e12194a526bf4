"""Losses over the global batch, before their gradient reaches the network: gradient caching."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dlops_dist.distributed.objective import Objective, objective_of_blocks
from dlops_dist.distributed.tree import Blocks, TreeSum
from dlops_dist.engine.gathered import Everyone
from dlops_dist.engine.gradients import gradients_of, or_zeros
from dlops_dist.engine.lanes import Lane, Lanes
from dlops_dist.engine.losses import Losses, figures_of
from dlops_dist.losses import Terms

Outputs = dict[str, Tensor]
"""{what losses read: (n, ...)} of a network."""


class Passed(NamedTuple):
    """A block after its pass through the network."""

    outputs: Outputs
    terms: dict[str, Terms]
    """Of the losses of own samples."""
    statistics: list[Tensor]
    """Of block norms, weighted by the block's share of the step."""


class Mined(NamedTuple):
    """Losses over the global batch whose gradient has reached the network's outputs, but not yet the network."""

    objective: Objective
    gradient: Outputs
    """With respect to the outputs of this rank's samples, in the order of the blocks."""
    of_weights: list[Sequence[Tensor | None]]
    """With respect to the weights of the losses, of each of this rank's blocks."""


def mine(
    loss: Losses, blocks: Blocks, lanes: Lanes, passed: Sequence[Sequence[Passed]], everyone: Everyone,
    host_labels: np.ndarray, figures: dict[str, Tensor] | None,
) -> Mined:  # fmt: skip
    """The losses of all samples, over all micro-batches, as gradients that each can back-propagate on its own.

    Gradient caching (Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size): embed everything, take the
    gradient with respect to the outputs alone, then embed again, part by part, where that was without a graph.

    Of a single micro-batch the terms of its other losses are known by then, and are exchanged with these.
    """
    layout, labels = everyone.layout, everyone.labels
    rows = {}
    for name in loss.read_by_all:
        own = [x.outputs[name] for of_block in zip(*passed, strict=True) for x in of_block]
        rows[name] = layout.by_batch(everyone.of(name, own, keep=len(passed) == 1)).detach().requires_grad_()
    weights = [p for p in loss.parameters() if p.requires_grad]
    with torch.enable_grad():
        shared = loss.shared(rows, labels)

    def terms_of(_: Lane, block: int) -> dict[str, Terms]:
        with torch.enable_grad():
            return loss.all_terms(rows, labels, blocks.part(len(labels), block), host_labels, shared)

    def of_block(_: Lane, terms: dict[str, Terms]) -> list[Tensor | None]:
        pairs = [(t.sum, objective.scales[name]) for name, t in terms.items()]
        return gradients_of(pairs, [*rows.values(), *weights])

    terms = lanes.map(terms_of, blocks.own)
    beside: list[dict[str, Terms]] = [x.terms for x in passed[0]] if len(passed) == 1 else [{} for _ in terms]
    both = [own | of_all for own, of_all in zip(beside, terms, strict=True)]
    objective = objective_of_blocks(both, loss.backward_weights, blocks)
    gradients = lanes.map(of_block, terms)
    widths = [x[0].numel() for x in rows.values()]
    added = TreeSum(blocks, pieces=[number * sum(widths) for number in layout.of_ranks])
    for block, found in zip(blocks.own, gradients, strict=True):
        parts = [or_zeros(g, x).flatten(1) for g, x in zip(found, rows.values(), strict=False)]
        added.add(block, layout.by_block(joined(parts, dim=1)).flatten())
    total = added.total().view(-1, sum(widths)).split(widths, dim=1)
    if figures is not None:
        figures |= figures_of(loss.of_all.values(), rows, labels, host_labels)
    return Mined(
        objective,
        {name: part.unflatten(1, x.shape[1:]) for (name, x), part in zip(rows.items(), total, strict=True)},
        [found[len(rows) :] for found in gradients],
    )


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
