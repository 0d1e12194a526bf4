"""What a step adds up over its blocks: gradients, and the statistics of norms, laid out in flat tensors."""

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate

import torch
from torch import Tensor, nn

from dlops_dist.distributed.collectives import world_size
from dlops_dist.distributed.norm import block_norms, move_all
from dlops_dist.distributed.tree import Blocks, TreeSum

ALIGNED = 16
"""Values; each tensor begins at a multiple."""


class Gradients:
    """Of one network and its losses: of each of this rank's blocks, then of all.

    Args:
        network: its block norms' statistics are added up too, and move the running ones.
        parameters: the weights that are trained.
    """

    def __init__(self, network: nn.Module, parameters: Sequence[nn.Parameter], blocks: Blocks) -> None:
        self.parameters, self._blocks = parameters, blocks
        self._norms = block_norms(network)
        for norm in self._norms:
            norm.passed = False  # what it is part of now may leave it out
        statistics = [x for norm in self._norms for x in (norm.block_mean, norm.block_var)]
        self._like = [x.detach() for x in (*self.parameters, *statistics)]
        self._dtype = reduce(torch.promote_types, {x.dtype for x in self._like})
        ends = list(accumulate(-(-x.numel() // ALIGNED) * ALIGNED for x in self._like))
        self._starts, whole = [0, *ends[:-1]], ALIGNED * world_size()
        self._size = -(-ends[-1] // whole) * whole
        self._views: dict[int, list[Tensor]] = {}
        """Of each flat tensor there is, by its identity: its parts, which have the shapes of what they stand for."""
        self._free: list[Tensor] = []
        self._of_block: dict[int, Tensor] = {}
        self._sum = TreeSum(blocks, self._free)
        self._total: Tensor | None = None
        self._given: set[int] = set()
        """Places of the weights that had a gradient in some block of a step."""

    def add(self, block: int, gradients: Sequence[Tensor | None], statistics: Sequence[Tensor]) -> None:
        """Add to those of a block. Threads may call it, each of blocks of its own."""
        begun = block in self._of_block
        if not begun:
            self._of_block[block] = self._free.pop() if self._free else self._new()
        parts = self._parts(self._of_block[block])
        given = [(part, x) for part, x in zip(parts, (*gradients, *statistics), strict=True) if x is not None]
        own, new = [part for part, _ in given], [x for _, x in given]
        self._given.update(place for place, x in enumerate(gradients) if x is not None)
        if begun:
            torch._foreach_add_(own, new)
            return
        torch._foreach_copy_(own, new)
        for part, x in zip(parts, gradients, strict=False):
            if x is None:
                part.zero_()

    def _new(self) -> Tensor:
        return torch.zeros(self._size, dtype=self._dtype, device=self._like[0].device)

    def finish(self, block: int) -> None:
        """A block's are whole."""
        self._sum.add(block, self._of_block.pop(block))

    def total(self) -> None:
        """Give each weight its gradient over all blocks, and move the norms' running statistics by theirs."""
        self._total = self._sum.total()
        self._sum = TreeSum(self._blocks, self._free)
        parts = self._parts(self._total)
        for place, parameter in enumerate(self.parameters):
            parameter.grad = parts[place].to(parameter.dtype) if place in self._given else None
        statistics = parts[len(self.parameters) :]
        move_all(list(zip(self._norms, statistics[::2], statistics[1::2], strict=True)))

    def forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        self._given.clear()
        if self._total is not None:
            self._free.append(self._total)
        self._total = None

    def _parts(self, flat: Tensor) -> list[Tensor]:
        if id(flat) not in self._views:
            self._views[id(flat)] = [
                flat.as_strided(x.shape, _dense_strides(x), start)
                for x, start in zip(self._like, self._starts, strict=True)
            ]
        return self._views[id(flat)]


def _dense_strides(x: Tensor) -> tuple[int, ...]:
    """Those of a weight where it has no gaps, else those of one without."""
    if x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x.stride()
    return torch.empty(x.shape, device="meta").stride()


def gradients_of(pairs: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Of outputs whose own gradients are known; what only frozen weights have made has none."""
    made = [pair for pair in pairs if pair[0].requires_grad]
    if not made or not inputs:
        return [None] * len(inputs)
    outputs, known = zip(*made, strict=True)
    return list(torch.autograd.grad(outputs, list(inputs), known, allow_unused=True))


def either_or_sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient
