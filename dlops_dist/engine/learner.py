"""What trains a recipe: images into embeddings and logits, by its model, on this rank."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dlops_dist.config import Run
from dlops_dist.data.augment import Augmenter, Normalize
from dlops_dist.data.draws import VIEW, uniform
from dlops_dist.data.keys import key
from dlops_dist.data.loader import Batch
from dlops_dist.data.mixing import Mixer
from dlops_dist.data.random_crops import in_epoch
from dlops_dist.data.readers import Reader
from dlops_dist.distributed.norm import (
    average_running_statistics,
    load_local_statistics,
    local_statistics,
    with_mean_statistics,
)
from dlops_dist.engine.descent import Descent
from dlops_dist.engine.ema import Ema
from dlops_dist.engine.epoch_sums import ClassifiedSums, count
from dlops_dist.engine.gathered import Everyone
from dlops_dist.engine.losses import Losses
from dlops_dist.engine.mined import Outputs
from dlops_dist.engine.numerics import compiled, compiles, memory_format_of, precision_of
from dlops_dist.engine.recipe import Recipe, made
from dlops_dist.engine.samples import Inputs
from dlops_dist.engine.step import Seen, Step
from dlops_dist.engine.warm_start import freeze
from dlops_dist.losses.terms import at_least_float32

BLOCK = 256
"""Samples that are evaluated together. A rank owns whole blocks, so the blocks do not depend on the ranks."""


class Network(nn.Module):
    """Embeddings (N, D) and logits (N, C) of images (N, H, W, 3) in [0, 255]: what is compiled, and copied for lanes.

    With `detach_head` the head learns on embeddings that its loss does not change.
    """

    def __init__(self, normalize: Normalize, model: Any, detach_head: bool) -> None:
        super().__init__()
        self.normalize, self.model, self.detach_head = normalize, model, detach_head

    def forward(self, images: Tensor, *draws: Tensor) -> tuple[Tensor, Tensor]:
        """`draws` are the random numbers that the model takes in training, if it takes any."""
        embeddings = self.model.embed(self.normalize(images), *draws)
        logits = self.model.fc(embeddings.detach() if self.detach_head else embeddings)
        return embeddings, logits


class Learner(Step):
    """The model of a recipe in training.

    Args:
        recipe: its model is trained, and so changed; by default that of the settings.
    """

    def __init__(
        self, settings: Run, inputs: Inputs, steps_per_epoch: int, device: torch.device, recipe: Recipe | None = None
    ) -> None:
        self.dtype, self.autocast = precision_of(settings, device)
        recipe = recipe or made(settings, inputs)
        memory_format = memory_format_of(recipe.model, device)
        model = recipe.model.to(device, self.dtype).to(memory_format=memory_format)
        loss = Losses(recipe.losses).to(device, self.dtype)
        self.directions, self.metrics, self.views = recipe.directions, recipe.metrics, recipe.views
        frozen = freeze(model, settings.freeze)
        self.ema = Ema(model, settings.ema_decay) if settings.ema_decay else None
        normalize = Normalize(inputs.mean, inputs.std, self.dtype, memory_format).to(device)
        self.network = Network(normalize, model, loss.detach_head)
        descent = Descent(
            self.network, settings, settings.optimizer, settings.epochs, steps_per_epoch, device,
            loss, recipe.optimizer, frozen,
        )  # fmt: skip
        self.classified = ClassifiedSums(list(loss.weights), list(loss.of_all), model.fc.weight, descent.plan.blocks)
        super().__init__(settings, inputs, device, model, loss, descent, self.classified)
        self.class_means = torch.full_like(model.fc.weight, torch.nan, requires_grad=False)
        """Mean training embedding of each class over the last whole epoch, (C, D)."""
        self._judged: nn.Module = descent.lanes.network
        if self.ema is not None:
            self._judged = compiled(Network(normalize, self.ema.model, loss.detach_head), settings, device)
        self.compiled = compiles(settings, device)
        """Whether each shape of a batch costs a compilation."""
        self.augment = Augmenter(
            settings.augment, settings.seed, inputs.mean, device, self.compiled, recipe.augment
        )  # fmt: skip
        self._mix = Mixer(settings.augment, inputs.num_classes, device) if settings.augment.mixes else None
        self.reads_next = settings.augment.mixes
        self._count = compiled(count, settings, device)

    def in_epoch(self, reader: Reader, epoch: int) -> Reader:
        return in_epoch(reader, self.settings.augment, self.settings.seed, epoch, self.views)

    def viewed(self, batch: Batch) -> Batch:
        return batch if self.views == 1 else _in_views(batch, self.views)

    def seen(self, batch: Batch, epoch: int) -> Seen:
        images, labels = self.augment(batch.images, batch.ids, epoch), batch.labels[batch.part]
        ids = batch.ids[: len(labels)]
        targets = labels
        if self._mix is not None:
            following = batch.labels.roll(-1)[batch.part]
            images, targets = self._mix(images, ids, labels, following, self.augment.keys(epoch))
        number = getattr(self.model, "num_draws", 0)
        draws = [uniform(key(self.settings.seed, epoch, "dropout"), ids, number)] if number else []
        return Seen((images, *draws), targets)

    def outputs(self, network: nn.Module, inputs: Sequence[Tensor]) -> Outputs:
        """Embeddings, wide enough for ranks to add up gradients of each other's rows, and logits."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            embeddings, logits = network(*inputs)
        return {"embeddings": at_least_float32(embeddings), "logits": logits}

    def stepped(
        self, step: int, outputs: Sequence[Outputs], labels: Sequence[Tensor], everyone: Everyone
    ) -> None:  # fmt: skip
        if self.ema is not None:
            self.ema.update(step)
        for place, (of_block, own) in enumerate(zip(outputs, labels, strict=True)):
            self._count(*self.classified.of_block(place), of_block["embeddings"], of_block["logits"], own)
        if self.classified.wants_everyone:
            rows = everyone.of("embeddings", [of_block["embeddings"] for of_block in outputs])
            self.classified.add_everyone(rows, everyone.layout.by_block(everyone.labels))

    def judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (N, D) and logits (N, C) of uint8 images, as they are evaluated.

        By the averaged weights, where `ema_decay` keeps some; with `flip_test` the mean over each image and its
        mirror image.
        """
        self._judged.eval()
        views = [images, images.flip(2)] if self.settings.flip_test else [images]
        outputs = [self.outputs(self._judged, [view]).values() for view in views]
        embeddings, logits = (torch.stack(parts).mean(dim=0) for parts in zip(*outputs, strict=True))
        return embeddings, logits

    def judged(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """One shape for all blocks costs one compilation."""
        images = batch.images
        missing = BLOCK - len(images) if self.compiled else 0
        padded = torch.cat([images, images.new_zeros(missing, *images.shape[1:])]) if missing else images
        embeddings, logits = self.judge(padded)
        return {"embeddings": embeddings[: len(images)], "logits": logits[: len(images)]}, batch.labels

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Begin with some of the model's weights, by their names."""
        self.model.load_state_dict(weights, strict=False)
        if self.ema is not None:
            self.ema.model.load_state_dict(self.model.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            **({} if self.ema is None else {"ema": with_mean_statistics(self.ema.model)}),
            "local_statistics": [local_statistics(model) for model in self._models],
            "class_means": self.class_means,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.ema is not None:
            self.ema.model.load_state_dict(state["ema"])
        for model, statistics in zip(self._models, state["local_statistics"], strict=True):
            load_local_statistics(model, statistics)
        self.class_means = state["class_means"]

    @property
    def _models(self) -> list[nn.Module]:
        """Each with running statistics of its own."""
        return [self.model] if self.ema is None else [self.model, self.ema.model]

    def epoch_ended(self, total: Mapping[str, Tensor]) -> None:
        for model in self._models:
            average_running_statistics(model)
        self.class_means = total["by_class"][:, 1:] / total["by_class"][:, :1]


def _in_views(batch: Batch, number: int) -> Batch:
    """Each sample so often, one after the other, and as many ids: random changes of each view are its own.

    Images may come as (n, number, H, W, C), a part for each view.
    """
    images = batch.images
    images = images.flatten(0, 1) if images.ndim == 5 else images.repeat_interleave(number, dim=0)
    ids = batch.ids[:, None] + torch.arange(number, device=batch.ids.device) * VIEW
    return Batch(
        images, ids.flatten(), batch.labels.repeat_interleave(number),
        slice(batch.part.start * number, batch.part.stop * number), batch.host_labels.repeat(number),
    )  # fmt: skip
