"""The samples of a step, those of all ranks, in the one order that they have for any number of ranks."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dlops_dist.data.readers import on_device
from dlops_dist.distributed.collectives import gather
from dlops_dist.distributed.tree import Blocks


class Layout:
    """Where the samples of a step's micro-batches stand: in the order of the blocks, as ranks hold them, or in that of
    the micro-batches, as losses see them.

    Args:
        lengths: samples of each micro-batch.
        views: how often each is seen, one time after the other.
    """

    def __init__(self, blocks: Blocks, lengths: Sequence[int], views: int) -> None:
        of_blocks = [[blocks.part(length // views, block) for block in range(blocks.number)] for length in lengths]
        self._sizes = np.array([[(part.stop - part.start) * views for part in of_batch] for of_batch in of_blocks])
        self._own = blocks.own
        ends = np.cumsum(blocks.sizes)
        totals = self._sizes.sum(axis=0)
        self.of_ranks = [int(totals[end - size : end].sum()) for end, size in zip(ends, blocks.sizes, strict=True)]
        """How many samples each rank has."""

    def place(self, place: int, batch: int) -> slice:
        """Of a micro-batch's samples in one of this rank's blocks, among all of this rank's."""
        before = self._sizes[:, self._own[0] : self._own[place]].sum() + self._sizes[:batch, self._own[place]].sum()
        return slice(int(before), int(before + self._sizes[batch, self._own[place]]))

    def by_batch(self, rows: Tensor) -> Tensor:
        """Rows in the order of the blocks in that of the micro-batches."""
        return rows if len(self._sizes) == 1 else rows[on_device(np.argsort(self._order()), rows.device)]

    def by_block(self, rows: Tensor) -> Tensor:
        """Rows in the order of the micro-batches in that of the blocks."""
        return rows if len(self._sizes) == 1 else rows[on_device(self._order(), rows.device)]

    def _order(self) -> np.ndarray:
        return _order(self._sizes.tobytes(), self._sizes.shape)


class Everyone:
    """All ranks' samples of a step: their labels, and their outputs once they are asked for.

    Args:
        labels: in the order of the micro-batches.
    """

    def __init__(self, layout: Layout, labels: Tensor) -> None:
        self.layout, self.labels = layout, labels
        self._known: dict[str, Tensor] = {}

    def of(self, name: str, own: Sequence[Tensor], keep: bool = True) -> Tensor:
        """Rows of an output in the order of the blocks, without gradient. All ranks must call it.

        Args:
            own: those of each of this rank's blocks, or of parts of them.
            keep: for whoever asks for it next.
        """
        if name in self._known:
            return self._known[name]
        rows = gather(torch.cat([x.detach() for x in own]), self.layout.of_ranks)
        if keep:
            self._known[name] = rows
        return rows


@lru_cache(maxsize=2)
def _order(sizes: bytes, shape: tuple[int, int]) -> np.ndarray:
    """Places among the micro-batches of the samples of each block, one block after the other."""
    blocks = np.tile(np.arange(shape[1]), shape[0])
    return np.argsort(np.repeat(blocks, np.frombuffer(sizes, np.int64)), kind="stable")
