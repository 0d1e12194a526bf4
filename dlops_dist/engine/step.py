"""One training step of anything, and all the state that it changes."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dlops_dist.config import Run
from dlops_dist.data.loader import Batch
from dlops_dist.data.readers import Reader
from dlops_dist.distributed.norm import running_statistics_held, with_mean_statistics
from dlops_dist.distributed.objective import Objective, objective_of_blocks
from dlops_dist.engine.descent import Descent
from dlops_dist.engine.epoch_sums import EpochSums
from dlops_dist.engine.gathered import Everyone, Layout
from dlops_dist.engine.lanes import Lane
from dlops_dist.engine.losses import Losses, figures_of
from dlops_dist.engine.mined import Mined, Outputs, Passed, joined, mine
from dlops_dist.engine.moved import flat, move, summed
from dlops_dist.engine.numerics import compiled
from dlops_dist.engine.samples import Inputs
from dlops_dist.metrics import Metric


class Seen(NamedTuple):
    """What a network is given of this rank's part of a batch."""

    inputs: tuple[Tensor, ...]
    targets: Tensor
    """What losses of a rank's own samples compare its outputs with: labels (n,), parts of labels (n, C), or images."""


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
        self.plan, self.blocks, self.lanes = descent.plan, descent.plan.blocks, descent.lanes
        self._layout = lru_cache(maxsize=2)(lambda lengths: Layout(self.blocks, lengths, self.views))

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._descent.optimizer

    def lr(self, step: int) -> float:
        """Learning rate of a step, counted from 0 over the stage."""
        return self._descent.lr(step)

    def in_epoch(self, reader: Reader, epoch: int) -> Reader:
        """What an epoch reads of the samples; by default what is there."""
        return reader

    @abstractmethod
    def seen(self, batch: Batch, epoch: int) -> Seen:
        """A batch as the epoch sees it."""

    @abstractmethod
    def outputs(self, network: nn.Module, inputs: Sequence[Tensor]) -> Outputs:
        """What a network makes of its inputs, as losses read it."""

    @abstractmethod
    def judged(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Outputs of a batch as it is evaluated, and what losses compare them with."""

    def stepped(  # noqa: B027
        self, step: int, outputs: Sequence[Outputs], labels: Sequence[Tensor], everyone: Everyone
    ) -> None:
        """After a step, whose outputs are given of each of this rank's blocks; by default nothing."""

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
        descent, loss = self._descent, self.loss
        self.lanes.set_training()
        descent.gradients.forget()
        cut = [self.cut(batch) for batch in micro_batches]
        seen = [self.lanes.map(lambda _, block: self.seen(block, epoch), own) for own in cut]
        lengths = [len(own[0].labels) for own in cut]
        layout = self._layout(tuple(lengths))
        everyone = Everyone(layout, joined([own[0].labels for own in cut]))
        shares = [[(block.part.stop - block.part.start) / sum(lengths) for block in own] for own in cut]
        host_labels = np.concatenate([own[0].host_labels for own in cut])

        passed: list[list[Passed]] = []
        mined = None
        if loss.of_all:
            if len(cut) == 1:
                passed = ahead = [self._pass(seen[0], shares[0])]
            else:
                with torch.no_grad(), running_statistics_held(self.model):
                    ahead = [self._pass(*given) for given in zip(seen, shares, strict=True)]
            mined = mine(loss, self.blocks, self.lanes, ahead, everyone, host_labels, figures)

        values = dict(mined.objective.values) if mined is not None else {}
        outputs: list[list[Outputs]] = []
        for i, own in enumerate(cut):
            of_blocks = passed[i] if passed else self._pass(seen[i], shares[i])
            outputs.append([{name: x.detach() for name, x in block.outputs.items()} for block in of_blocks])
            if i == 0 and loss.moved and not descent.gradients.num_carried:
                none = {name: x[:0] for name, x in outputs[0][0].items()}
                descent.gradients.carry(flat(summed(loss.moved, none, everyone.labels[:0], sum(lengths))))
            if passed and mined is not None:
                objective = mined.objective
            else:
                terms = [block.terms for block in of_blocks]
                objective = objective_of_blocks(terms, loss.backward_weights, self.blocks, lengths[i] / sum(lengths))
                for name, value in objective.values.items():
                    values[name] = values[name] + value if name in values else value
            if i < len(cut) - 1:
                self._back_propagate(of_blocks, own, objective, mined, layout, i)
        ours = [{name: joined([o[name] for o in parts]) for name in parts[0]} for parts in zip(*outputs, strict=True)]
        own_labels = [joined([b.labels[b.part] for b in blocks]) for blocks in zip(*cut, strict=True)]
        sums = [summed(loss.moved, *given, sum(lengths)) for given in zip(ours, own_labels, strict=True)]
        self._back_propagate(of_blocks, own, objective, mined, layout, len(cut) - 1, list(map(flat, sums)))

        descent.step(step, figures)
        losses = torch.stack([values[name] for name in loss.weights])
        self.sums.add_losses(losses, [len(labels) for labels in own_labels], loss.defined(host_labels))
        if loss.moved:
            move(loss.moved, descent.gradients.carried, sums[0], ours, everyone)
        if figures is not None:
            every = {name: joined([outputs[name] for outputs in ours]) for name in ours[0]}
            figures |= figures_of(loss.of_own.values(), every, joined(own_labels), host_labels)
        self.stepped(step, ours, own_labels, everyone)
        return (losses * self._weights).sum()

    def cut(self, batch: Batch) -> list[Batch]:
        """This rank's blocks of a batch."""
        parts = (self.blocks.part(len(batch.labels), block) for block in self.blocks.own)
        return [self.viewed(batch.part_of(part, self.reads_next)) for part in parts]

    def viewed(self, batch: Batch) -> Batch:
        """A batch with each sample so often as it is seen."""
        return batch

    def _pass(self, seen: Sequence[Seen], shares: Sequence[float]) -> list[Passed]:
        """This rank's blocks, through the network."""

        def passed(lane: Lane, block: tuple[Seen, float]) -> Passed:
            seen, share = block
            outputs = self.outputs(lane.network, seen.inputs)
            terms = self._own_terms(outputs, seen.targets)
            return Passed(outputs, terms, list(torch._foreach_mul(lane.statistics, share)) if lane.statistics else [])

        return self.lanes.map(passed, list(zip(seen, shares, strict=True)))

    def _back_propagate(
        self, passed: Sequence[Passed], own: Sequence[Batch], objective: Objective, mined: Mined | None,
        layout: Layout, batch: int, carried: Sequence[Sequence[Tensor]] | None = None,
    ) -> None:  # fmt: skip
        """Add to each block's gradients what a micro-batch gives, as many blocks at once as there are lanes.

        Args:
            carried: what is added up with the gradients of each block. Given with the last micro-batch: the blocks'
                gradients are whole then.
        """
        sums, number, last = self._descent.gradients, len(self.lanes), carried is not None

        def back_propagated(_: Lane, place: int) -> None:
            block = passed[place]
            pairs = [(terms.sum, objective.scales[name]) for name, terms in block.terms.items()]
            gradients = {} if mined is None else mined.gradient
            pairs += [(block.outputs[name], x[layout.place(place, batch)]) for name, x in gradients.items()]
            more = mined.of_weights[place] if mined is not None and batch == 0 else ()
            ends = last and number == 1 and place == len(passed) - 1
            others = carried[place] if carried is not None else ()
            sums.take(self.blocks.own[place], pairs, more, block.statistics, ends, others)

        for start in range(0, len(passed), number):
            places = range(start, min(start + number, len(passed)))
            self.lanes.map(back_propagated, places)
            if last:
                for place in places:
                    sums.finish(self.blocks.own[place])

    def state_dict(self) -> dict[str, Any]:
        """The state to resume from, as plain tensors and numbers. Every rank must call it."""
        return {
            "model": with_mean_statistics(self.model),
            "loss": self.loss.state_dict(),
            "optimizer": self._descent.optimizer.state_dict(),
            "sums": self.sums.of_each_block(),
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
        total = self.sums.total()
        self.epoch_ended(total)
        figures = self.sums.metrics(total)
        return {"loss": self.loss.total(figures), **figures}

    def epoch_ended(self, total: Mapping[str, Tensor]) -> None:  # noqa: B027
        """After an epoch, whose sums are given; by default nothing."""
