"""Each layer's pretraining, all layers unrolled, then the classifier, or one for each fold."""

import copy
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dlops_dist.data.loader import TrainingOrder
from dlops_dist.data.order import Ids
from dlops_dist.data.readers import Joined, Reader
from dlops_dist.distributed.norm import BlockBatchNorm1d, SyncBatchNorm1d
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.recipe import Recipe
from dlops_dist.engine.samples import Inputs, Samples, balance_notices, training_order
from dlops_dist.engine.stages import Stage, judged, named
from dlops_dist.errors import UserError
from dlops_dist.losses import CrossEntropyLoss
from dlops_dist.models.autoencoder import StackedAutoencoder, StackedAutoencoderClassifier
from dlops_dist.recipes.stacked.codes import Codes
from dlops_dist.recipes.stacked.reconstruction import ReconstructionLearner
from dlops_dist.recipes.stacked.settings import Stack

MEASURED = 1024
"""Samples whose mean square stands for that of all."""
NORMS = {"none": None, "batch": BlockBatchNorm1d, "sync": SyncBatchNorm1d, "layer": nn.LayerNorm}


def stacked_stages(settings: Stack, samples: Samples, device: torch.device, tell: Callable[[str], None]) -> list[Stage]:
    shared = Shared(settings, samples, device, tell)
    layers = len(settings.model.layers)
    stages = [reconstruction(shared, f"layer {i + 1}", i, settings.pretrain.epochs) for i in range(layers)]
    if settings.pretrain.joint_epochs:
        stages.append(reconstruction(shared, "joint", None, settings.pretrain.joint_epochs))
    if not settings.folds:
        return [*stages, classification(shared, "classifier", samples.ids)]
    num_folds = samples.manifest.num_folds
    if not num_folds:
        raise UserError(f"folds: {settings.data.shards} names no folds; leave out --folds")
    for fold in range(num_folds):
        ids = samples.ids[samples.folds[samples.ids] >> fold & 1 == 1]
        stages.append(classification(shared, f"fold {fold}", ids, is_last=fold == num_folds - 1))
    return stages


class Shared:
    """What the stages of a run hand on: the stack that is trained layer by layer, and codes of its samples."""

    def __init__(self, settings: Stack, samples: Samples, device: torch.device, tell: Callable[[str], None]) -> None:
        self.settings, self.samples, self.device, self._tell = settings, samples, device, tell
        num_train, num_unlabeled = len(samples.train), len(samples.unlabeled or ())
        self.ids = np.concatenate([samples.ids, num_train + np.arange(num_unlabeled)])

    @cached_property
    def stack(self) -> StackedAutoencoder:
        stack = build_stack(self.settings, self.samples.inputs)
        return stack.to(self.device, torch.float64 if self.settings.precision == "float64" else torch.float32)

    @cached_property
    def carried(self) -> nn.Module | None:
        """A later fold starts from the pretrained encoders again."""
        return nn.ModuleList(self.stack.encoders) if self.settings.folds else None

    @cached_property
    def codes(self) -> Codes:
        samples = self.samples
        pretrained: Reader = samples.train if samples.unlabeled is None else Joined([samples.train, samples.unlabeled])
        pixels = {"train": pretrained, "test": samples.test}
        return Codes(self.settings, samples.inputs, self.stack, pixels, self.device, self._tell)

    @cached_property
    def order(self) -> TrainingOrder:
        """Of every image that is not held out, labelled or not."""
        settings = self.settings
        labels = np.zeros(self.ids.max() + 1, np.int64)
        return TrainingOrder(self.ids, labels, settings.seed, settings.global_batch_size, None, settings.data.drop_last)


def reconstruction(shared: Shared, name: str, layer: int | None, epochs: int) -> Stage:
    """Train one layer of the stack, or all of it, to reconstruct."""
    settings, samples, order = shared.settings, shared.samples, shared.order

    def learner() -> ReconstructionLearner:
        return ReconstructionLearner(
            settings, samples.inputs, shared.stack, shared.codes, layer, order.steps_per_epoch, shared.device
        )

    def reader(learner: ReconstructionLearner) -> Reader:
        found = shared.codes.at(layer or 0)["train"]
        learner.measure(found, shared.ids[:MEASURED])
        return found

    def figures(learner: ReconstructionLearner) -> dict[str, Any]:
        readers = shared.codes.at(layer or 0)
        val = named("val", learner.error(readers["train"], samples.val_ids)) if len(samples.val_ids) else {}
        return val | named("test", learner.error(readers["test"], np.arange(len(samples.test))))

    def pictured(folder: Path, learner: ReconstructionLearner, _: dict[str, Any]) -> None:
        from dlops_dist import draw
        from dlops_dist.recipes.stacked import pictures

        if layer in (0, None):
            draw.image_grid(folder / "filters.png", pictures.filters(learner))
        if layer == 0:
            draw.samples(folder / "samples.png", Path(settings.data.shards), samples.manifest)
        depth = len(learner.model) if layer is None else layer + 1
        images = pictures.reconstructions(learner, samples.test, depth)
        draw.image_grid(folder / "reconstructions.png", images, columns=len(images) // (1 + depth))

    return Stage(epochs, order, learner, reader, figures, name, draw=pictured)


def classification(shared: Shared, name: str, ids: Ids, is_last: bool = True) -> Stage:
    """Train the classifier on some of the labelled samples, from the pretrained encoders.

    Only the last one of a run draws: folds would draw over each other's pictures.
    """
    settings, samples = shared.settings, shared.samples
    order = training_order(settings, samples, ids)

    def learner() -> Learner:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(settings.seed)
            recipe = classifier(settings, samples.inputs, shared.stack)
        return Learner(settings, samples.inputs, order.steps_per_epoch, shared.device, recipe)

    def pictured(folder: Path, _: Any, row: dict[str, Any]) -> None:
        if not is_last:
            return
        from dlops_dist import draw

        classes = samples.manifest.classes
        draw.class_accuracies(folder / "classes.png", row["test/top1_by_class"], classes)
        draw.confusion(folder / "confusion.png", row["test/confusion"], classes)

    return Stage(
        settings.epochs, order, learner, reader=lambda _: samples.train,
        figures=lambda learner: judged(learner, samples, with_confusion=True), name=name,
        notices=balance_notices(order, samples.manifest.classes), carried=lambda: shared.carried, draw=pictured,
    )  # fmt: skip


def build_stack(settings: Stack, inputs: Inputs) -> StackedAutoencoder:
    """The initial weights are a function of the seed alone."""
    chosen, (height, width) = settings.model, inputs.image_size
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        return StackedAutoencoder(height * width * 3, chosen.layers, NORMS[chosen.norm], chosen.tied)


def classifier(settings: Stack, inputs: Inputs, stack: StackedAutoencoder) -> Recipe:
    """A new head on copies of the encoders."""
    chosen = settings.model
    over = SyncBatchNorm1d if chosen.norm == "sync" else BlockBatchNorm1d
    model = StackedAutoencoderClassifier(
        copy.deepcopy(stack.encoders), chosen.code_layer, inputs.num_classes, chosen.dropout, settings.finetune,
        over if chosen.standardize else None,
    )  # fmt: skip
    return Recipe(model, {"ce": (1.0, CrossEntropyLoss(settings.ce.label_smoothing))})
