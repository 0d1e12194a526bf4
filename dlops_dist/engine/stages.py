"""A run is a sequence of stages: each trains one thing on its own order of samples. Most runs have one of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dlops_dist.config import Run
from dlops_dist.data.loader import TrainingOrder
from dlops_dist.data.readers import Reader
from dlops_dist.engine.evaluation import OF_A_HEAD, evaluate
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.recipe import Recipe, mistakes_placed
from dlops_dist.engine.samples import Samples, balance_notices, training_order
from dlops_dist.errors import UserError

COLLAPSED_SPREAD = 0.01


@dataclass(frozen=True)
class Stage:
    """What is trained on which samples, for how many epochs, and how it is judged."""

    epochs: int
    order: TrainingOrder
    learner: Callable[[], Any]
    """Makes a new `Step`, its weights as earlier stages left them."""
    reader: Callable[[Any], Reader]
    """Of the samples to train on, for a learner whose state is that to go on from. Every rank must call it."""
    figures: Callable[[Any], dict[str, Any]]
    """Of an epoch's evaluation of a learner, by split: {"test/loss": ...}, equal on every rank."""
    name: str | None = None
    """None where a run has but one stage."""
    notices: Sequence[str] = ()
    """What the user should know before it begins."""
    carried: Callable[[], nn.Module | None] = lambda: None
    """What later stages need beside the learner's state; its own state is in every checkpoint of this stage."""
    draw: Callable[[Path, Any, dict[str, Any]], None] = lambda folder, learner, row: None
    """Writes pictures into a folder, after the last epoch, whose row is given. Called on rank 0 alone."""


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


def checkpoints_after(step: int, spans: Sequence[Span], every: int | None) -> int:
    """How many a run writes yet: one for each epoch that is not over, and one every so many steps; no fewer."""
    epochs = sum(max(0, span.end_epoch - max(span.first_epoch, int(span.epoch_of(step)))) for span in spans)
    return epochs + ((spans[-1].end_step - step) // every if every else 0)


def training(settings: Run, samples: Samples, recipe: Recipe, device: torch.device) -> Stage:
    """The one stage of most runs: train a recipe's model on all samples that are not held out."""
    names = ("loss", *recipe.losses, *OF_A_HEAD, *recipe.metrics)
    if settings.choose_by.removeprefix("val/") not in names:
        raise UserError(f"choose_by: {settings.choose_by}: there is no such figure; there are val/ {', '.join(names)}")
    not_mixed = [name for name, (_, loss) in recipe.losses.items() if not getattr(loss, "takes_mixed", False)]
    if settings.augment.mixes and (not_mixed or recipe.views > 1):
        what = (
            f"the loss {not_mixed[0]} takes labels, not parts of them" if not_mixed else "several views are not mixed"
        )
        raise UserError(f"augment.mixup, augment.cutmix: {what}; leave them at 0")
    with mistakes_placed(settings):
        order = training_order(settings, samples, samples.ids, recipe.balanced, recipe.batches)
    return Stage(
        settings.epochs, order, partial(Learner, settings, samples.inputs, order.steps_per_epoch, device, recipe),
        reader=lambda _: samples.train, figures=lambda learner: judged(learner, samples),
        notices=[*(f"inexact: {what}" for what in recipe.inexact), *balance_notices(order, samples.manifest.classes)],
    )  # fmt: skip


def judged(learner: Learner, samples: Samples, with_confusion: bool = False) -> dict[str, Any]:
    """The figures of a classifier, of what is held out and of test."""
    val = named("val", evaluate(learner, samples.train, samples.val_ids)) if len(samples.val_ids) else {}
    test = evaluate(learner, samples.test, np.arange(len(samples.test)), with_confusion)
    return val | named("test", test)


def collapse(row: Mapping[str, Any]) -> str | None:
    """What the user should know of an epoch's row."""
    spread = row.get("train/embedding_spread", 1)
    if spread >= COLLAPSED_SPREAD:
        return None
    advice = "lower optimizer.lr, give a loss of the logits more weight, or mine other triplets"
    return f"epoch {row['epoch']}: the embeddings have collapsed (spread {spread:.4f}): {advice}"


def named(split: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{split}/{name}": value for name, value in figures.items()}
