"""One training step of anything, and all the state that it changes."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dlops_dist.config import Run
from dlops_dist.data.loader import Batch
from dlops_dist.data.order import part_sizes, rank_part
from dlops_dist.distributed.collectives import all_sum, gather, rank, world_size
from dlops_dist.distributed.norm import running_statistics_held, with_mean_statistics
from dlops_dist.distributed.objective import global_objective, update_state
from dlops_dist.engine.descent import Descent
from dlops_dist.engine.epoch_sums import EpochSums
from dlops_dist.engine.losses import Losses, figures_of
from dlops_dist.engine.numerics import compiled
from dlops_dist.engine.samples import Inputs
from dlops_dist.metrics import Metric

Outputs = dict[str, Tensor]
"""{what losses read: (n, ...)} of a network."""


class Seen(NamedTuple):
    """What a network is given of this rank's part of a batch."""

    inputs: tuple[Tensor, ...]
    targets: Tensor
    """What losses of a rank's own samples compare its outputs with: labels (n,), parts of labels (n, C), or images."""


class _Mined(NamedTuple):
    """Losses over the global batch whose gradient has reached the network's outputs, but not yet the network."""

    values: dict[str, Tensor]
    gradients: list[Outputs]
    """With respect to this rank's outputs of each micro-batch."""


class Step(ABC):
    """A network under losses and an optimiser, on this rank.

    Everything that the next step depends on is in `state_dict`, and is the same on every rank, but for `sums`, this
    rank's share of the epoch so far, and the statistics of local norms: of those, every rank's are in it.

    Args:
        model: whose state is kept.
        loss: of it, on the device.
        descent: of the part of it that is trained.
    """

    metrics: Mapping[str, Metric]
    """Of an evaluation."""
    reads_next = False
    """Whether a batch holds the sample after this rank's part, too."""
    views = 1
    """How often a step sees each sample."""

    def __init__(
        self, settings: Run, inputs: Inputs, device: torch.device, model: Any, loss: Losses, descent: Descent,
        sums: EpochSums,
    ) -> None:  # fmt: skip
        self.settings, self.inputs, self.device = settings, inputs, device
        self.model, self.loss, self.sums = model, loss, sums
        self._descent = descent
        self._own_terms = compiled(loss.own_terms, settings, device)
        self._weights = torch.tensor(list(loss.weights.values()), dtype=torch.float64, device=device)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._descent.optimizer

    def lr(self, step: int) -> float:
        """Learning rate of a step, counted from 0 over the stage."""
        return self._descent.lr(step)

    @abstractmethod
    def seen(self, batch: Batch, epoch: int) -> Seen:
        """A batch as the epoch sees it."""

    @abstractmethod
    def outputs(self, network: nn.Module, inputs: Sequence[Tensor]) -> Outputs:
        """What a network makes of its inputs, as losses read it."""

    @abstractmethod
    def judged(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Outputs of a batch as it is evaluated, and what losses compare them with."""

    def stepped(self, step: int, outputs: Outputs, labels: Tensor) -> None:  # noqa: B027  # by default nothing
        """After a step, whose outputs of this rank's samples are given."""

    def step(
        self, micro_batches: Sequence[Batch], epoch: int, step: int, figures: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Train on this rank's parts of a global batch. Returns the loss over the whole of it, without gradient.

        One micro-batch, the usual case, is the global batch. Gradients of several add up to those of the whole; a loss
        that sees all samples sees those of all of them, however little goes through the model at once.

        Args:
            epoch: counted from 0 over the run.
            step: counted from 0 over the stage.
            figures: takes more that is to be known of the step, on the device: the gradient's norm over all ranks, and
                what the losses have to say. On one rank alone; it changes no bit.
        """
        self._descent.set_training()
        seen = [self.seen(batch, epoch) for batch in micro_batches]
        self._descent.settle(lambda: self.outputs(self._descent.distributed, seen[0].inputs).values())
        self._descent.forget_gradients()
        loss = self.loss
        mined = self._mine_ahead(seen, micro_batches, figures) if loss.of_all and len(seen) > 1 else None
        sizes = [self._part_sizes(batch) for batch in micro_batches]
        num_samples = sum(len(batch.labels) for batch in micro_batches)

        values: dict[str, Tensor] = {}
        parts = []
        for i, batch in enumerate(micro_batches):
            with self._descent.exchanged(now=i == len(seen) - 1):
                ours = self.outputs(self._descent.distributed, seen[i].inputs)
                terms = self._own_terms(ours, seen[i].targets)
                if loss.of_all and mined is None:
                    everyone = {name: gather(ours[name], sizes[i]) for name in loss.read_by_all}
                    terms |= loss.all_terms(everyone, batch.labels, batch.part, batch.host_labels)
                    if figures is not None:
                        figures |= figures_of(loss.of_all.values(), everyone, batch.labels, batch.host_labels)
                objective = global_objective(terms, loss.backward_weights, len(batch.labels) / num_samples)
                objective.backward(*([] if mined is None else [(ours[k], g) for k, g in mined.gradients[i].items()]))
            values |= {name: values[name] + v if name in values else v for name, v in objective.values.items()}
            parts.append({name: x.detach() for name, x in ours.items()} | {"labels": batch.labels[batch.part]})
        if mined is not None:
            values |= mined.values

        self._descent.step(step, figures)
        ours = {name: _joined([part[name] for part in parts]) for name in parts[0]}
        labels = ours.pop("labels")
        of_ranks = [sum(of_rank) for of_rank in zip(*sizes, strict=True)]
        for moved in loss.moved:
            update_state(moved, ours[moved.reads], labels, of_ranks)
        host_labels = np.concatenate([batch.host_labels for batch in micro_batches])
        if figures is not None:
            figures |= figures_of(loss.of_own.values(), ours, labels, host_labels)
        losses = torch.stack([values[name] for name in loss.weights])
        self.sums.add_losses(losses, len(labels), loss.defined(host_labels))
        self.stepped(step, ours, labels)
        return (losses * self._weights).sum()

    def _mine_ahead(
        self, seen: Sequence[Seen], micro_batches: Sequence[Batch], figures: dict[str, Tensor] | None
    ) -> _Mined:
        """The losses of all samples, over all micro-batches, as gradients that each can back-propagate on its own.

        Gradient caching (Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size): embed everything without
        a graph, differentiate the loss with respect to the outputs alone, then embed again, part by part.
        """
        lengths, names = [len(batch.labels) for batch in micro_batches], self.loss.read_by_all
        with torch.no_grad(), running_statistics_held(self.model):
            ours = [self.outputs(self._descent.undistributed, part.inputs) for part in seen]
        sizes = [self._part_sizes(batch) for batch in micro_batches]
        everyone = {
            name: torch.cat([gather(o[name], s) for o, s in zip(ours, sizes, strict=True)]).requires_grad_()
            for name in names
        }
        labels = torch.cat([batch.labels for batch in micro_batches])
        host_labels = np.concatenate([batch.host_labels for batch in micro_batches])
        anchors = rank_part(len(labels), rank(), world_size())
        objective = global_objective(
            self.loss.all_terms(everyone, labels, anchors, host_labels), self.loss.backward_weights
        )
        weights = [p for loss in self.loss.of_all.values() for p in loss.parameters()]
        gradients = torch.autograd.grad(
            objective.sums, [*everyone.values(), *weights], objective.scales, allow_unused=bool(weights)
        )
        for parameter, gradient in zip(weights, gradients[len(names) :], strict=True):
            parameter.grad = gradient
        if figures is not None:
            figures |= figures_of(self.loss.of_all.values(), everyone, labels, host_labels)
        each = [all_sum(gradient).split(lengths) for gradient in gradients[: len(names)]]
        return _Mined(
            objective.values,
            [
                {name: parts[i][batch.part] for name, parts in zip(names, each, strict=True)}
                for i, batch in enumerate(micro_batches)
            ],
        )

    def _part_sizes(self, batch: Batch) -> list[int]:
        """Rows of each rank's outputs: a sample's views are on one rank."""
        return [size * self.views for size in part_sizes(len(batch.labels) // self.views, world_size())]

    def state_dict(self) -> dict[str, Any]:
        """The state to resume from, as plain tensors and numbers. Every rank must call it."""
        return {
            "model": with_mean_statistics(self.model),
            "loss": self.loss.state_dict(),
            "optimizer": self._descent.optimizer.state_dict(),
            "sums": self.sums.of_each_rank(),
            "inputs": self.inputs._asdict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.loss.load_state_dict(state.get("loss", {}))
        self._descent.optimizer.load_state_dict(state["optimizer"])
        self.sums.load(state["sums"])

    def equal_on_all_ranks(self) -> dict[str, Tensor]:
        """The tensors that training changes alike on every rank, to the last bit: weights and centres."""
        return {**self._descent.trained(), **self.loss.state_dict()}

    def end_epoch(self) -> dict[str, float | None]:
        """Figures of the epoch's training, equal on every rank; the next epoch's sums start at zero."""
        figures = self.sums.metrics(self.sums.total())
        self.sums.clear()
        return {"loss": self.loss.total(figures), **figures}


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
