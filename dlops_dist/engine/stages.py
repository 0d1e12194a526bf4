"""A run is a sequence of stages: each trains one thing on its own order of samples. q1 has one of them, q2 several."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dlops_dist.config import Q1, Q2, Settings
from dlops_dist.data.loader import Batch, TrainingOrder
from dlops_dist.data.order import Ids, fit_samples_per_class, hold_out
from dlops_dist.data.readers import Reader
from dlops_dist.data.shards import Manifest, Split
from dlops_dist.engine.classification import Classifier
from dlops_dist.engine.epoch_sums import RankSums
from dlops_dist.engine.evaluation import evaluate
from dlops_dist.engine.learner import Inputs, Learner
from dlops_dist.errors import UserError

COLLAPSED_SPREAD = 0.01
SHOWN_CLASSES = 3


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


class Samples:
    """The samples of a run: those to train on, those held out, those to test on, those without a label."""

    def __init__(self, shards: Path, manifest: Manifest, settings: Settings) -> None:
        data = settings.data
        self.manifest = manifest
        names = ["train", "test"]
        if isinstance(settings, Q2) and settings.pretrain.unlabeled and "unlabeled" in manifest.splits:
            names.append("unlabeled")
        self._splits = [Split(shards, manifest, name) for name in names]
        self.open(list)
        self.folds = self._splits[0].folds
        if (self.train.labels < 0).any() or (self.test.labels < 0).any():
            raise UserError(f"data.shards: {data.shards}: samples without a label among those of train or test")
        self.ids, self.val_ids = hold_out(self.train.labels, data.val_fraction)
        if not len(self.ids) or (data.val_fraction and not len(self.val_ids)):
            raise UserError(
                f"data.val_fraction: {data.val_fraction} leaves {len(self.ids)} to train and "
                f"{len(self.val_ids)} held out"
            )
        standardize = not isinstance(settings, Q2) or settings.model.standardize
        mean, std = (manifest.mean, manifest.std) if standardize else ((0.0,) * 3, (1.0,) * 3)
        self.inputs = Inputs(len(manifest.classes), mean, std)

    def open(self, open_readers: Callable[[Sequence[Split]], list[Reader]]) -> None:
        """Read images by these readers from now on."""
        self.train, self.test, *others = open_readers(self._splits)
        self.unlabeled = others[0] if others else None


class Classification:
    """Trains a model with a head on labelled images: all of q1, the last stage of q2.

    Args:
        ids: of the samples to train on; by default all that are not held out.
    """

    name: str | None = None
    with_confusion = False

    def __init__(self, settings: Settings, samples: Samples, device: torch.device, ids: Ids | None = None) -> None:
        self.epochs = settings.epochs
        self.order = training_order(settings, samples, samples.ids if ids is None else ids)
        self._settings, self._samples, self._device = settings, samples, device

    @property
    def carried(self) -> nn.Module | None:
        return None

    def notice(self) -> str | None:
        return balance_notice(self.order, self._samples.manifest.classes)

    def model(self) -> Classifier | None:
        """A new one; None for that of q1."""
        return None

    def learner(self) -> Learner:
        return Learner(self._settings, self._samples.inputs, self.order.steps_per_epoch, self._device, self.model())

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
        advice = "lower optimizer.lr"
        if isinstance(self._settings, Q1):
            advice += ", raise the loss's ce_weight, or choose another triplet.mining"
        return f"epoch {row['epoch']}: the embeddings have collapsed (spread {spread:.4f}): {advice}"

    def draw(self, folder: Path, learner: Learner, row: dict[str, Any]) -> None:
        """q1 draws in `report`."""


def training_order(settings: Settings, samples: Samples, ids: Ids) -> TrainingOrder:
    """The batches of every epoch of labelled samples."""
    data, batch_size = settings.data, settings.global_batch_size
    triplets = isinstance(settings, Q1) and settings.loss == "triplet"
    balanced = data.order == "balanced" or (data.order == "auto" and triplets)
    samples_per_class = (
        fit_samples_per_class(batch_size, len(samples.manifest.classes), data.samples_per_class) if balanced else None
    )
    repeat = data.small_classes == "repeat"
    labels = samples.train.labels
    return TrainingOrder(ids, labels, settings.seed, batch_size, samples_per_class, data.drop_last, repeat)


def balance_notice(order: TrainingOrder, classes: Sequence[str]) -> str | None:
    """Which samples balanced batches leave out, and for how long others wait; None where there is nothing to say."""
    balance = order.balance
    if balance is None:
        return None
    parts = []
    if len(balance.left_out):
        k, names = balance.samples_per_class, [classes[c] for c in balance.left_out.tolist()]
        left_out = int(balance.sizes[balance.left_out].sum())
        parts.append(
            f"leave out {left_out} of {order.num_samples:,} samples, of {len(names)} classes with fewer than {k}: "
            f"{', '.join(names[:SHOWN_CLASSES])}{', ...' * (len(names) > SHOWN_CLASSES)}; a lower "
            f"--data.samples-per-class or --data.small-classes repeat takes them"
        )
    if balance.rounds > 2:
        parts.append(f"take a part of the larger classes in each epoch, and all of them within {balance.rounds} epochs")
    return f"data.order: balanced batches {', and '.join(parts)}" if parts else None


def named(split: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{split}/{name}": value for name, value in figures.items()}
