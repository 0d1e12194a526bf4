"""A run is a sequence of stages: each trains one thing on its own order of samples. Most runs have one of them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dlops_dist.config import Run
from dlops_dist.data.loader import Batch, TrainingOrder
from dlops_dist.data.order import Ids
from dlops_dist.data.readers import Reader
from dlops_dist.engine.epoch_sums import RankSums
from dlops_dist.engine.evaluation import evaluate
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.recipe import Recipe
from dlops_dist.engine.samples import Samples, balance_notice, training_order

COLLAPSED_SPREAD = 0.01


class StageLearner(Protocol):
    """What a stage trains, on this rank."""

    sums: RankSums

    @property
    def model(self) -> nn.Module: ...

    def lr(self, step: int) -> float:
        """Of a step, counted from 0 over the stage."""
        ...

    def step(
        self, micro_batches: Sequence[Batch], epoch: int, step: int, figures: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Train on this rank's parts of a global batch. The loss over the whole of it, without gradient.

        Args:
            epoch: counted from 0 over the run.
            step: counted from 0 over the stage.
            figures: takes more that is to be known of the step, on the device; on one rank alone. It changes no bit.
        """
        ...

    def end_epoch(self) -> Mapping[str, float | None]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def equal_on_all_ranks(self) -> dict[str, Tensor]: ...


class Stage(Protocol):
    """What is trained on which samples, for how many epochs, and how it is judged."""

    epochs: int
    order: TrainingOrder

    @property
    def name(self) -> str | None:
        """None where a run has but one stage."""
        ...

    @property
    def carried(self) -> nn.Module | None:
        """What later stages need beside the learner's state; its own state is in every checkpoint of this stage."""
        ...

    def notice(self) -> str | None:
        """What the user should know before it begins."""
        ...

    def learner(self) -> Any:
        """A new learner, its weights as earlier stages left them."""
        ...

    def reader(self, learner: Any) -> Reader:
        """Of the samples to train on. Every rank must call it, once the learner's state is that to go on from."""
        ...

    def figures(self, learner: Any) -> dict[str, Any]:
        """Of an epoch's evaluation, by split: {"test/loss": ...}, equal on every rank."""
        ...

    def warning(self, row: dict[str, Any]) -> str | None:
        """What the user should know of an epoch's row."""
        ...

    def draw(self, folder: Path, learner: Any, row: dict[str, Any]) -> None:
        """Write pictures into a folder, after the last epoch, whose row is given. Called on rank 0 alone."""
        ...


class Span(NamedTuple):
    """Where a stage lies in its run, whose epochs and steps are numbered from 0 through all stages."""

    first_epoch: int
    first_step: int
    epochs: int
    steps_per_epoch: int

    @property
    def end_epoch(self) -> int:
        return self.first_epoch + self.epochs

    @property
    def end_step(self) -> int:
        return self.first_step_of(self.end_epoch)

    def first_step_of(self, epoch: int) -> int:
        return self.first_step + (epoch - self.first_epoch) * self.steps_per_epoch

    def epoch_of(self, step: int) -> float:
        """How many epochs of the run are over after so many of its steps."""
        return self.first_epoch + (step - self.first_step) / self.steps_per_epoch


def spans_of(stages: Sequence[Stage]) -> list[Span]:
    spans, epoch, step = [], 0, 0
    for stage in stages:
        span = Span(epoch, step, stage.epochs, stage.order.steps_per_epoch)
        spans.append(span)
        epoch, step = span.end_epoch, span.end_step
    return spans


class Classification:
    """Trains a model with a head on labelled images.

    Args:
        build: the recipe of the stage, when it begins: its model may come of earlier stages.
        ids: of the samples to train on; by default all that are not held out.
        balanced: whether batches are so, where data.order is auto.
    """

    name: str | None = None
    with_confusion = False

    def __init__(
        self, settings: Run, samples: Samples, device: torch.device, build: Callable[[], Recipe],
        ids: Ids | None = None, balanced: bool = False,
    ) -> None:  # fmt: skip
        self.epochs = settings.epochs
        self.order = training_order(settings, samples, samples.ids if ids is None else ids, balanced)
        self._settings, self._samples, self._device, self._build = settings, samples, device, build

    @property
    def carried(self) -> nn.Module | None:
        return None

    def notice(self) -> str | None:
        return balance_notice(self.order, self._samples.manifest.classes)

    def learner(self) -> Learner:
        steps = self.order.steps_per_epoch
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._settings.seed)
            recipe = self._build()
        return Learner(self._settings, self._samples.inputs, steps, self._device, recipe)

    def reader(self, _: Learner) -> Reader:
        return self._samples.train

    def figures(self, learner: Learner) -> dict[str, Any]:
        samples, val = self._samples, {}
        if len(samples.val_ids):
            val = named("val", evaluate(learner, samples.train, samples.val_ids))
        test = evaluate(learner, samples.test, np.arange(len(samples.test)), self.with_confusion)
        return val | named("test", test)

    def warning(self, row: dict[str, Any]) -> str | None:
        spread = row["train/embedding_spread"]
        if spread >= COLLAPSED_SPREAD:
            return None
        advice = "lower optimizer.lr, give a loss of the logits more weight, or mine other triplets"
        return f"epoch {row['epoch']}: the embeddings have collapsed (spread {spread:.4f}): {advice}"

    def draw(self, folder: Path, learner: Learner, row: dict[str, Any]) -> None:
        """`report` draws what all runs have."""


def named(split: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{split}/{name}": value for name, value in figures.items()}
