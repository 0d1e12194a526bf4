"""What a rank remembers of an epoch's steps until the epoch's row of metrics is made of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dlops_dist.distributed.collectives import all_sum, of_all_ranks, rank, world_size
from dlops_dist.losses.center import add_rows
from dlops_dist.metrics import rank_of_label, unit_length


class EpochSums:
    """Sums over the samples of an epoch so far: each rank adds its own, `total` is that of all ranks.

    Args:
        losses: their names.
        of_all: those of all samples.
    """

    def __init__(self, losses: Sequence[str], of_all: Sequence[str], device: torch.device) -> None:
        self._losses, self._of_all = losses, of_all
        self.counts = torch.zeros(1 + len(losses), dtype=torch.float64, device=device)
        """Samples, then each loss summed over samples."""
        self._own = {"counts": self.counts}

    def total(self) -> dict[str, Tensor]:
        return {name: all_sum(own) for name, own in self._own.items()}

    def of_each_rank(self) -> dict[str, Tensor]:
        """Every rank's sums, stacked in rank order: what a checkpoint holds."""
        return {name: of_all_ranks(own) for name, own in self._own.items()}

    def load(self, of_each_rank: dict[str, Tensor]) -> None:
        """Go on from a checkpoint: each rank from its own sums, or, where their number changed, one from the total."""
        for name, value in of_each_rank.items():
            if len(value) == world_size():
                self._own[name].copy_(value[rank()])
            else:
                self._own[name].copy_(value.sum(dim=0) * (rank() == 0))

    def clear(self) -> None:
        for own in self._own.values():
            own.zero_()

    def top1(self) -> float | None:
        """Accuracy of the epoch so far, on this rank's samples; None where nothing is classified."""
        return None

    def add_losses(self, losses: Tensor, num_samples: int, defined: bool) -> None:
        """Means of a step's losses, in the order of their names, and how many of its samples are this rank's.

        Where the global batch has no term of a loss of all samples, no triplet say, that loss is 0 and says nothing.
        """
        self.counts[0] += num_samples
        self.counts[1:].add_(losses, alpha=num_samples)

    def metrics(self, total: dict[str, Tensor]) -> dict[str, float | None]:
        """Means over the epoch."""
        samples, *losses = total["counts"].tolist()
        return {name: loss / samples for name, loss in zip(self._losses, losses, strict=True)}


class ClassifiedSums(EpochSums):
    """Those of a model with a head, whose accuracies and embeddings are summed too.

    Args:
        like: has the shape (C, D), type and device of the head.
    """

    def __init__(self, losses: Sequence[str], of_all: Sequence[str], like: Tensor) -> None:
        super().__init__(losses, of_all, like.device)
        num_classes, embedding_dim = like.shape
        self.counts = like.new_zeros(4 + len(losses), dtype=torch.float64)
        """Samples, top-1, top-5, samples of steps where a loss had no term, then each loss summed over samples."""
        self.by_class = like.new_zeros(num_classes, 1 + embedding_dim)
        """Samples and summed embeddings of each class."""
        self.unit = like.new_zeros(embedding_dim, dtype=torch.float64)
        """Summed embeddings of length 1."""
        self._own = {"counts": self.counts, "by_class": self.by_class, "unit": self.unit}

    def add_losses(self, losses: Tensor, num_samples: int, defined: bool) -> None:
        self.counts[4:].add_(losses, alpha=num_samples)
        if not defined:
            self.counts[3] += num_samples

    def add(self, embeddings: Tensor, logits: Tensor, labels: Tensor) -> None:
        """This rank's samples of a step."""
        place = rank_of_label(logits, labels)
        self.counts[0] += len(labels)
        self.counts[1] += (place < 1).sum()
        self.counts[2] += (place < 5).sum()
        ones = self.by_class.new_ones(len(labels), 1)
        add_rows(self.by_class, labels, torch.cat([ones, embeddings.to(ones.dtype)], dim=1))
        self.unit += unit_length(embeddings).sum(dim=0)

    def top1(self) -> float:
        samples, top1 = self.counts[:2].tolist()
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
