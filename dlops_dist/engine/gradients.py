"""What a step adds up over its blocks: gradients, and the statistics of norms, laid out in flat tensors."""

from collections.abc import Sequence
from functools import partial, reduce
from itertools import accumulate

import torch
from torch import Tensor, nn

from dlops_dist.distributed.collectives import world_size
from dlops_dist.distributed.norm import block_norms, move_all
from dlops_dist.distributed.tree import Blocks, TreeSum

ALIGNED = 16
"""Values; each tensor begins at a multiple."""
BUCKET = 25 * 2**20
"""Bytes that are exchanged together, as DDP does: enough to be fast, few enough to begin while the pass goes on."""


class Gradients:
    """Of one network and its losses: of each of this rank's blocks, then of all.

    Args:
        network: its block norms' statistics are added up too, and move the running ones.
        parameters: the weights that are trained.
    """

    def __init__(self, network: nn.Module, parameters: Sequence[nn.Parameter], blocks: Blocks) -> None:
        self.parameters, self._norms, self._blocks = parameters, block_norms(network), blocks
        for norm in self._norms:
            norm.passed = False  # what it is part of now may leave it out
        self._given: set[int] = set()
        """Places of the weights that had a gradient in some block of a step."""
        self.carried: list[Tensor] = []
        """What else was added up in the last step."""
        self._lay_out([])

    def _lay_out(self, carried: Sequence[Tensor]) -> None:
        statistics = [x for norm in self._norms for x in (norm.block_mean, norm.block_var)]
        like = [x.detach() for x in (*self.parameters, *statistics, *carried)]
        dtype = reduce(torch.promote_types, {x.dtype for x in like})
        places = _bucketed([x.numel() * dtype.itemsize for x in like])
        self._buckets = [_Bucket(own, [like[place] for place in own], dtype, self._blocks) for own in places]
        self._num_carried = len(carried)

    def carry(self, like: Sequence[Tensor]) -> None:
        """Before a step's first `take`: let tensors of these shapes be added up too, if any, from now on."""
        if like and not self._num_carried:
            self._lay_out(like)

    def take(
        self, block: int, pairs: Sequence[tuple[Tensor, Tensor]], more: Sequence[Tensor | None],
        statistics: Sequence[Tensor], last: bool, carried: Sequence[Tensor | None] = (),
    ) -> None:  # fmt: skip
        """Add those of a backward pass to those of a block. Threads may call it, each for blocks of its own.

        Args:
            pairs: outputs, and their own gradients.
            more: known gradients of the last of the weights.
            carried: what else is added up.
            last: whether this rank passes nothing more in the step: what is whole is exchanged while the pass goes on.
        """
        number = len(self.parameters)
        found: list[Tensor | None] = [None] * number
        known = [*(None for _ in range(number - len(more))), *more]
        missing = [{place for place in bucket.places if place < number} for bucket in self._buckets]
        others = [*statistics, *(carried or [None] * self._num_carried)]
        taken = 0

        def take_next() -> None:
            nonlocal taken
            bucket, taken = self._buckets[taken], taken + 1
            own = [
                either_or_sum(found[place], known[place]) if place < number else others[place - number]
                for place in bucket.places
            ]
            self._given.update(place for place, x in zip(bucket.places, own, strict=True) if x is not None)
            bucket.add(block, own)
            if last:
                bucket.finish(block)
                bucket.start()

        def arrived(place: int, gradient: Tensor) -> None:
            found[place] = gradient
            for places in missing:
                places.discard(place)
            while taken < len(missing) and not missing[taken]:
                take_next()

        overlaps = last and world_size() > 1
        hooks = [x.register_hook(partial(arrived, place)) for place, x in enumerate(self.parameters) if overlaps]
        try:
            found = gradients_of(pairs, self.parameters)
        finally:
            for hook in hooks:
                hook.remove()
        while taken < len(self._buckets):
            take_next()

    def finish(self, block: int) -> None:
        """A block's are whole."""
        for bucket in self._buckets:
            bucket.finish(block)

    def total(self) -> None:
        """Give each weight its gradient over all blocks, and move the norms' running statistics by theirs."""
        for bucket in self._buckets:
            bucket.start()
        parts = {
            place: part for bucket in self._buckets for place, part in zip(bucket.places, bucket.total(), strict=True)
        }
        for place, parameter in enumerate(self.parameters):
            parameter.grad = parts[place].to(parameter.dtype) if place in self._given else None
        others = [parts[place] for place in range(len(self.parameters), len(parts))]
        statistics, self.carried = others[: 2 * len(self._norms)], others[2 * len(self._norms) :]
        move_all(list(zip(self._norms, statistics[::2], statistics[1::2], strict=True)))

    def forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        self._given.clear()
        for bucket in self._buckets:
            bucket.forget()


class _Bucket:
    """Some of the tensors that adjoin: those of each block laid out in a flat one, then their sum over all blocks.

    Args:
        places: theirs, among all.
        like: tensors of their shapes.
    """

    def __init__(self, places: range, like: Sequence[Tensor], dtype: torch.dtype, blocks: Blocks) -> None:
        self.places, self._like, self._dtype, self._blocks = places, like, dtype, blocks
        ends = list(accumulate(-(-x.numel() // ALIGNED) * ALIGNED for x in like))
        self._starts, whole = [0, *ends[:-1]], ALIGNED * world_size()
        self._size = -(-ends[-1] // whole) * whole
        self._views: dict[int, tuple[Tensor, list[Tensor]]] = {}
        """By its identity, which none other has while it is kept: each flat tensor, and its parts in their shapes."""
        self._free: list[Tensor] = []
        self._of_block: dict[int, Tensor] = {}
        self._sum = TreeSum(blocks, self._free)
        self._total: Tensor | None = None

    def add(self, block: int, tensors: Sequence[Tensor | None]) -> None:
        begun = block in self._of_block
        if not begun:
            self._of_block[block] = self._free.pop() if self._free else self._new()
        parts = self._parts(self._of_block[block])
        given = [(part, x) for part, x in zip(parts, tensors, strict=True) if x is not None]
        own, new = [part for part, _ in given], [x for _, x in given]
        if begun:
            torch._foreach_add_(own, new)
            return
        torch._foreach_copy_(own, new)
        for part, x in zip(parts, tensors, strict=True):
            if x is None:
                part.zero_()

    def _new(self) -> Tensor:
        return torch.zeros(self._size, dtype=self._dtype, device=self._like[0].device)

    def finish(self, block: int) -> None:
        """A block's are whole, if they were not before."""
        if (own := self._of_block.pop(block, None)) is not None:
            self._sum.add(block, own)

    def start(self) -> None:
        """All of this rank's blocks are: the exchange may begin. All ranks call it for one bucket after the other."""
        self._sum.start()

    def total(self) -> list[Tensor]:
        """The sums over all blocks."""
        self._total = self._sum.total()
        self._sum = TreeSum(self._blocks, self._free)
        return self._parts(self._total)

    def forget(self) -> None:
        if self._total is not None:
            self._free.append(self._total)
        self._total = None

    def _parts(self, flat: Tensor) -> list[Tensor]:
        if id(flat) not in self._views:
            self._views[id(flat)] = (
                flat,
                [
                    flat.as_strided(x.shape, _dense_strides(x), start)
                    for x, start in zip(self._like, self._starts, strict=True)
                ],
            )
        return self._views[id(flat)][1]


def _bucketed(sizes: Sequence[int]) -> list[range]:
    """Places that adjoin, of some `BUCKET` bytes together; the last come first, as a backward pass ends with them."""
    buckets, end, size = [], len(sizes), 0
    for place in reversed(range(len(sizes))):
        size += sizes[place]
        if size >= BUCKET or place == 0:
            buckets.append(range(place, end))
            end, size = place, 0
    return buckets


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
