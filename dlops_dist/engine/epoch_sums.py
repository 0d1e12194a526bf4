"""What is remembered of an epoch's steps until the epoch's row of metrics is made of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dlops_dist.distributed.collectives import rank
from dlops_dist.distributed.tree import Blocks, TreeSum
from dlops_dist.losses.center import add_rows
from dlops_dist.metrics import rank_of_label, unit_length

LARGEST = 2**30
"""Bytes of the sums of classes of all blocks. Where they would be more, the sums are kept once, on every rank the same:
each step adds its samples in their order, gathered from all ranks."""


class EpochSums:
    """Sums over the samples of an epoch so far: of each of this rank's blocks, and in the end their `total` over all.

    Args:
        losses: their names.
        of_all: those of all samples.
    """

    def __init__(self, losses: Sequence[str], of_all: Sequence[str], device: torch.device, blocks: Blocks) -> None:
        self._losses, self._of_all, self._blocks = losses, of_all, blocks
        self.counts = torch.zeros(len(blocks.own), 1 + len(losses), dtype=torch.float64, device=device)
        """Samples, then each loss summed over samples."""
        self._own = {"counts": self.counts}
        self._kept_once: set[str] = set()
        """Names of those that are not a block's, but all blocks'."""

    def total(self) -> dict[str, Tensor]:
        """Over all blocks, the same bits on every rank; the next epoch's sums start at zero."""
        found = {}
        for name, own in self._own.items():
            if name in self._kept_once:
                found[name] = own[0].clone()
            else:
                added = TreeSum(self._blocks)
                for block, rows in zip(self._blocks.own, own, strict=True):
                    added.add(block, rows.flatten())
                found[name] = added.total().view(own.shape[1:]).clone()
            own.zero_()
        return found

    def of_each_block(self) -> dict[str, Tensor]:
        """Every block's sums, in their order, or all blocks' once: what a checkpoint holds."""
        return {name: own if name in self._kept_once else self._blocks.of_all(own) for name, own in self._own.items()}

    def load(self, of_each_block: dict[str, Tensor]) -> None:
        """Go on from a checkpoint: each block from its own sums, or, where their number changed, one from the total."""
        for name, value in of_each_block.items():
            if name in self._kept_once:
                self._own[name][0] = value.sum(dim=0)
            elif len(value) == self._blocks.number:
                self._own[name].copy_(value[self._blocks.own.start : self._blocks.own.stop])
            else:
                self._own[name].zero_()
                self._own[name][0] = value.sum(dim=0) * (rank() == 0)

    def top1(self) -> float | None:
        """Accuracy of the epoch so far, on this rank's samples; None where nothing is classified."""
        return None

    def add_losses(self, losses: Tensor, num_samples: Sequence[int], defined: bool) -> None:
        """Means of a step's losses, in the order of their names, and how many of its samples are in each block.

        Where the global batch has no term of a loss of all samples, no triplet say, that loss is 0 and says nothing.
        """
        for counts, number in zip(self.counts, num_samples, strict=True):
            counts[0] += number
            counts[1:].add_(losses, alpha=number)

    def metrics(self, total: dict[str, Tensor]) -> dict[str, float | None]:
        """Means over the epoch."""
        samples, *losses = total["counts"].tolist()
        return {name: loss / samples for name, loss in zip(self._losses, losses, strict=True)}


class ClassifiedSums(EpochSums):
    """Those of a model with a head, whose accuracies and embeddings are summed too.

    Args:
        like: has the shape (C, D), type and device of the head.
    """

    def __init__(self, losses: Sequence[str], of_all: Sequence[str], like: Tensor, blocks: Blocks) -> None:
        super().__init__(losses, of_all, like.device, blocks)
        num_classes, embedding_dim = like.shape
        self.counts = like.new_zeros(len(blocks.own), 4 + len(losses), dtype=torch.float64)
        """Samples, top-1, top-5, samples of steps where a loss had no term, then each loss summed over samples."""
        once = blocks.number * num_classes * (1 + embedding_dim) * like.element_size() > LARGEST
        self.by_class = like.new_zeros(1 if once else len(blocks.own), num_classes, 1 + embedding_dim)
        """Samples and summed embeddings of each class."""
        self.unit = like.new_zeros(len(blocks.own), embedding_dim, dtype=torch.float64)
        """Summed embeddings of length 1."""
        self._own = {"counts": self.counts, "by_class": self.by_class, "unit": self.unit}
        self._kept_once = {"by_class"} if once else set()

    def of_block(self, place: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """What `count` takes of one of this rank's blocks."""
        return self.counts[place], None if self._kept_once else self.by_class[place], self.unit[place]

    @property
    def wants_everyone(self) -> bool:
        """Whether `add_everyone` is to be called in each step."""
        return bool(self._kept_once)

    def add_everyone(self, embeddings: Tensor, labels: Tensor) -> None:
        """Add all samples of a step to the sums of their classes."""
        _add_by_class(self.by_class[0], embeddings, labels)

    def add_losses(self, losses: Tensor, num_samples: Sequence[int], defined: bool) -> None:
        for counts, number in zip(self.counts, num_samples, strict=True):
            counts[4:].add_(losses, alpha=number)
            if not defined:
                counts[3] += number

    def top1(self) -> float:
        samples, top1 = self.counts[:, :2].sum(dim=0).tolist()
        return top1 / samples

    def metrics(self, total: dict[str, Tensor]) -> dict[str, float | None]:
        """Means over the epoch: accuracies of the head, each loss, spread of the embeddings' directions in [0, 1].

        A loss of all samples is the mean over the steps where it had a term; None where there were none.
        """
        samples, top1, top5, undefined, *losses = total["counts"].tolist()
        direction = (total["unit"] / samples).square().sum().item()
        figures = {"top1": top1 / samples, "top5": top5 / samples, "embedding_spread": 1 - direction}
        judged = [samples - undefined * (name in self._of_all) for name in self._losses]
        return figures | {
            name: loss / number if number else None
            for name, loss, number in zip(self._losses, losses, judged, strict=True)
        }


def count(
    counts: Tensor, by_class: Tensor | None, unit: Tensor, embeddings: Tensor, logits: Tensor, labels: Tensor
) -> None:
    """Add a block's samples of a step to its sums."""
    place = rank_of_label(logits, labels)
    counts[0] += len(labels)
    counts[1] += (place < 1).sum()
    counts[2] += (place < 5).sum()
    if by_class is not None:
        _add_by_class(by_class, embeddings, labels)
    unit += unit_length(embeddings).sum(dim=0)


def _add_by_class(by_class: Tensor, embeddings: Tensor, labels: Tensor) -> None:
    ones = by_class.new_ones(len(labels), 1)
    add_rows(by_class, labels, torch.cat([ones, embeddings.to(ones.dtype)], dim=1))
