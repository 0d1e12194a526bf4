"""Sums over blocks of samples in one fixed binary tree: the same bits for any number of ranks that share the blocks.

In floating point a + b is b + a, but (a + b) + c is not a + (b + c): only the tree matters, not who adds.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from dlops_dist.data.order import part_sizes, rank_part
from dlops_dist.distributed.collectives import gather, rank, world_size

Node = tuple[int, int]
"""The sum of the blocks from the first to before the second number."""


class Blocks:
    """What a global batch is cut into: V contiguous blocks, of which each rank computes some that adjoin.

    Args:
        number: V, at least the number of ranks; by default a block for each of them.
    """

    def __init__(self, number: int | None = None) -> None:
        self.number = number or world_size()
        self.sizes = part_sizes(self.number, world_size())
        """How many each rank computes."""
        own = rank_part(self.number, rank(), world_size())
        self.own = range(own.start, own.stop)

    def part(self, num_samples: int, block: int) -> slice:
        """Where a block's samples stand in a batch."""
        return rank_part(num_samples, block, self.number)

    def share(self, num_samples: int) -> slice:
        """Where all of this rank's samples do."""
        return slice(self.part(num_samples, self.own[0]).start, self.part(num_samples, self.own[-1]).stop)

    def shares(self, num_samples: int) -> list[int]:
        """How many samples each rank has."""
        ends = [sum(self.sizes[: r + 1]) for r in range(len(self.sizes))]
        starts = [end - size for end, size in zip(ends, self.sizes, strict=True)]
        first = [self.part(num_samples, block).start for block in starts]
        last = [self.part(num_samples, block - 1).stop for block in ends]
        return [end - start for start, end in zip(first, last, strict=True)]

    def of_all(self, own: Tensor) -> Tensor:
        """(V, ...) of what is known of each block, from this rank's."""
        return gather(own, self.sizes)


class TreeSum:
    """Adds up a flat tensor of each block, of one size and type: first this rank's, then those of all ranks.

    Args:
        free: takes the tensors that are not needed any more.
        pieces: how many of the values each rank wants, one after the other; by default each wants all.
    """

    def __init__(
        self, blocks: Blocks, free: list[Tensor] | None = None, pieces: Sequence[int] | None = None
    ) -> None:  # fmt: skip
        self._blocks, self._held, self._pieces = blocks, dict[Node, Tensor](), pieces
        self._free = [] if free is None else free
        self._exchange: Any = None
        self._whole = self._received = torch.empty(0)
        self._size = 0

    def add(self, block: int, x: Tensor) -> None:
        """Take a block's tensor, over which sums are written."""
        self._free += _rise(self._held, (block, block + 1), x, self._blocks.number)

    def start(self) -> None:
        """Begin the exchange, which goes on beside what is computed. All ranks must call it, all of theirs added."""
        ranks = world_size()
        if ranks == 1 or self._exchange is not None:
            return
        own = [self._held[node] for node in sorted(self._held)]
        self._size, rest = len(own[0]), -len(own[0]) % ranks
        if rest and self._pieces is None:
            own = [F.pad(x, (0, rest)) for x in own]
        self._whole, pieces = own[0], list(self._pieces or [len(own[0]) // ranks] * ranks)
        self._free += own[1:]
        sent = own[0] if len(own) == 1 else torch.cat([part for of_rank in _cut(own, pieces) for part in of_rank])
        nodes, piece = _nodes_of_ranks(tuple(self._blocks.sizes)), pieces[rank()]
        self._received = own[0].new_empty(sum(map(len, nodes)), piece)
        self._exchange = dist.all_to_all_single(
            self._received.view(-1), sent, [len(n) * piece for n in nodes], [len(own) * size for size in pieces],
            async_op=True,
        )  # fmt: skip

    def total(self) -> Tensor:
        """The same bits on every rank, or its piece of them; all must call it, once. Written over what was given."""
        if world_size() == 1:
            (total,) = self._held.values()
            return total
        self.start()
        self._exchange.wait()
        held: dict[Node, Tensor] = {}
        nodes = [node for of_rank in _nodes_of_ranks(tuple(self._blocks.sizes)) for node in of_rank]
        for node, x in zip(nodes, self._received, strict=True):
            _rise(held, node, x, self._blocks.number)
        (summed,) = held.values()
        if self._pieces is not None:
            return summed
        dist.all_gather_into_tensor(self._whole, summed)
        return self._whole if len(self._whole) == self._size else self._whole[: self._size]


def _cut(tensors: Sequence[Tensor], pieces: Sequence[int]) -> Iterator[tuple[Tensor, ...]]:
    """The pieces of each rank, of all tensors."""
    return zip(*(x.split(list(pieces)) for x in tensors), strict=True)


def tree_sum(rows: Tensor) -> Tensor:
    """The sum of rows (V, ...), one of each block, as a `TreeSum` adds them."""
    held: dict[Node, Tensor] = {}
    for block, row in enumerate(rows.detach().clone()):
        _rise(held, (block, block + 1), row, len(rows))
    (total,) = held.values()
    return total


def _rise(held: dict[Node, Tensor], node: Node, x: Tensor, number: int) -> list[Tensor]:
    """Put a node's sum among those held; with its sibling there, that of the parent instead, and so on up.

    Returns the tensors that are free then.
    """
    parents, free = _parents(number), []
    while node in parents and parents[node][1] in held:
        parent, sibling = parents[node]
        free.append(x)
        node, x = parent, held.pop(sibling).add_(x)
    held[node] = x
    return free


@cache
def _parents(number: int) -> dict[Node, tuple[Node, Node]]:
    """{node: (its parent, its sibling)} of the tree over so many blocks."""
    found: dict[Node, tuple[Node, Node]] = {}
    below = [(0, number)]
    while below:
        node = first, end = below.pop()
        if end - first > 1:
            middle = first + 2 ** ((end - first - 1).bit_length() - 1)  # a left part is a whole binary tree
            left, right = (first, middle), (middle, end)
            found |= {left: (node, right), right: (node, left)}
            below += [left, right]
    return found


@cache
def _nodes_of_ranks(sizes: Sequence[int]) -> list[list[Node]]:
    """The sums that each rank holds once its own blocks are added up."""
    found, first = [], 0
    for size in sizes:
        held: dict[Node, Tensor] = {}
        for block in range(first, first + size):
            _rise(held, (block, block + 1), torch.zeros(()), sum(sizes))
        found.append(sorted(held))
        first += size
    return found
