"""One training step, and all the state that it changes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dlops_dist.config import Run
from dlops_dist.data.augment import Augmenter, Normalize
from dlops_dist.data.draws import uniform
from dlops_dist.data.keys import key
from dlops_dist.data.loader import Batch
from dlops_dist.data.order import part_sizes, rank_part
from dlops_dist.distributed.collectives import all_sum, gather, rank, world_size
from dlops_dist.distributed.norm import (
    average_running_statistics,
    load_local_statistics,
    local_statistics,
    running_statistics_held,
    with_mean_statistics,
)
from dlops_dist.distributed.objective import global_objective, update_state
from dlops_dist.engine.descent import Descent
from dlops_dist.engine.ema import Ema
from dlops_dist.engine.epoch_sums import EpochSums
from dlops_dist.engine.network import TwoOutputs
from dlops_dist.engine.numerics import compiled, compiles, memory_format_of, precision_of
from dlops_dist.engine.recipe import Losses, Recipe, figures_of, made
from dlops_dist.engine.samples import Inputs
from dlops_dist.losses.terms import at_least_float32


class _Mined(NamedTuple):
    """Losses over the global batch whose gradient has reached the model's outputs, but not yet the model."""

    values: dict[str, Tensor]
    gradients: list[dict[str, Tensor]]
    """With respect to this rank's outputs of each micro-batch."""


class Learner:
    """Model, losses and optimiser of a run, on this rank.

    Everything that the next step depends on is in `state_dict`, and is the same on every rank, but for `sums`, this
    rank's share of the epoch so far, and the statistics of local norms: of those, every rank's are in it.

    Args:
        recipe: its model is trained, and so changed; by default that of the settings.
    """

    def __init__(
        self, settings: Run, inputs: Inputs, steps_per_epoch: int, device: torch.device, recipe: Recipe | None = None
    ) -> None:
        self.settings, self.device, self.inputs = settings, device, inputs
        self.dtype, self.autocast = precision_of(settings, device)
        recipe = recipe or made(settings, inputs)
        memory_format = memory_format_of(recipe.model, device)
        self.model = recipe.model.to(device, self.dtype).to(memory_format=memory_format)
        self.directions = recipe.directions
        self.loss = Losses(recipe).to(device, self.dtype)
        self.sums = EpochSums(list(self.loss.weights), list(self.loss.of_all), self.model.fc.weight)
        self.class_means = torch.full_like(self.model.fc.weight, torch.nan, requires_grad=False)
        """Mean training embedding of each class over the last whole epoch, (C, D)."""
        self.ema = Ema(self.model, settings.ema_decay) if settings.ema_decay else None
        normalize = Normalize(inputs.mean, inputs.std, self.dtype, memory_format).to(device)
        self.network = TwoOutputs(normalize, self.model, self.loss.detach_head)
        self.network.train()  # encoders may be copies of evaluated ones
        self._descent = Descent(
            self.network, settings, settings.optimizer, settings.epochs, steps_per_epoch, device,
            list(self.loss.parameters()),
        )  # fmt: skip
        self._judged: nn.Module = self._descent.undistributed
        if self.ema is not None:
            averaged = TwoOutputs(normalize, self.ema.model, self.loss.detach_head)
            self._judged = compiled(averaged, settings, device)
        self.compiled = compiles(settings, device)
        """Whether each shape of a batch costs a compilation."""
        self._augmenter = Augmenter(settings.augment, settings.seed, inputs.mean, device, self.compiled)
        self._own_terms = compiled(self.loss.own_terms, settings, device)
        self._count = compiled(self.sums.add, settings, device)
        self._weights = torch.tensor(list(self.loss.weights.values()), dtype=torch.float64, device=device)

    def lr(self, step: int) -> float:
        """Learning rate of a step, counted from 0 over all epochs."""
        return self._descent.lr(step)

    def step(
        self, micro_batches: Sequence[Batch], epoch: int, step: int, figures: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Train on this rank's parts of a global batch. Returns the loss over the whole of it, without gradient.

        One micro-batch, the usual case, is the global batch. Gradients of several add up to those of the whole; a loss
        that sees all samples sees those of all of them, however little goes through the model at once.

        Args:
            figures: takes the gradient's norm over all ranks, and what the losses have to say.
        """
        if not self.model.training:  # going through all modules takes 0.2 ms
            self._descent.distributed.train()
        images = [self._augmenter(batch.images, batch.ids, epoch) for batch in micro_batches]
        draws = [self._draws(batch, epoch) for batch in micro_batches]
        self._descent.settle(lambda: self._forward(self._descent.distributed, images[0], *draws[0]))
        self._descent.forget_gradients()
        loss = self.loss
        mined = self._mine_ahead(images, draws, micro_batches, figures) if loss.of_all and len(images) > 1 else None
        sizes = [part_sizes(len(batch.labels), world_size()) for batch in micro_batches]
        num_samples = sum(len(batch.labels) for batch in micro_batches)

        values: dict[str, Tensor] = {}
        outputs = []
        for i, batch in enumerate(micro_batches):
            labels = batch.labels[batch.part]
            with self._descent.exchanged(now=i == len(images) - 1):
                embeddings, logits = self._forward(self._descent.distributed, images[i], *draws[i])
                ours = {"embeddings": embeddings, "logits": logits}
                terms = self._own_terms(embeddings, logits, labels)
                if loss.of_all and mined is None:
                    everyone = {name: gather(ours[name], sizes[i]) for name in loss.read_by_all}
                    terms |= loss.all_terms(everyone, batch.labels, batch.part, batch.host_labels)
                    if figures is not None:
                        figures |= figures_of(loss.of_all.values(), everyone, batch.labels, batch.host_labels)
                objective = global_objective(terms, loss.backward_weights, len(batch.labels) / num_samples)
                objective.backward(*([] if mined is None else [(ours[k], g) for k, g in mined.gradients[i].items()]))
            values |= {name: values[name] + v if name in values else v for name, v in objective.values.items()}
            outputs.append((embeddings.detach(), logits.detach(), labels))
        if mined is not None:
            values |= mined.values

        self._descent.step(step, figures)
        if self.ema is not None:
            self.ema.update(step)
        embeddings, logits, labels = (p[0] if len(p) == 1 else torch.cat(p) for p in zip(*outputs, strict=True))
        ours = {"embeddings": embeddings, "logits": logits}
        of_ranks = [sum(parts) for parts in zip(*sizes, strict=True)]
        for moved in loss.moved:
            update_state(moved, ours[moved.reads], labels, of_ranks)
        host_labels = np.concatenate([batch.host_labels for batch in micro_batches])
        if figures is not None:
            figures |= figures_of(loss.of_own.values(), ours, labels, host_labels)
        losses = torch.stack([values[name] for name in loss.weights])
        self.sums.add_losses(losses, len(labels), loss.defined(host_labels))
        self._count(embeddings, logits, labels)
        return (losses * self._weights).sum()

    def judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (N, D) and logits (N, C) of uint8 images, as they are evaluated.

        By the averaged weights, where `ema_decay` keeps some; with `flip_test` the mean over each image and its
        mirror image.
        """
        self._judged.eval()
        views = [images, images.flip(2)] if self.settings.flip_test else [images]
        outputs = [self._forward(self._judged, view) for view in views]
        embeddings, logits = (torch.stack(parts).mean(dim=0) for parts in zip(*outputs, strict=True))
        return embeddings, logits

    def _draws(self, batch: Batch, epoch: int) -> list[Tensor]:
        """Uniform numbers (n, U) for the model's dropout, keyed by sample; none where it has none."""
        number = getattr(self.model, "num_draws", 0)
        return [uniform(key(self.settings.seed, epoch, "dropout"), batch.ids, number)] if number else []

    def _forward(self, network: nn.Module, images: Tensor, *draws: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings, wide enough for ranks to add up gradients of each other's rows, and logits."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            embeddings, logits = network(images, *draws)
        return at_least_float32(embeddings), logits

    def _mine_ahead(
        self, images: Sequence[Tensor], draws: Sequence[list[Tensor]], micro_batches: Sequence[Batch],
        figures: dict[str, Tensor] | None,
    ) -> _Mined:  # fmt: skip
        """The losses of all samples, over all micro-batches, as gradients that each can back-propagate on its own.

        Gradient caching (Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size): embed everything without
        a graph, differentiate the loss with respect to the outputs alone, then embed again, part by part.
        """
        lengths, names = [len(batch.labels) for batch in micro_batches], self.loss.read_by_all
        with torch.no_grad(), running_statistics_held(self.model):
            outputs = [
                self._forward(self._descent.undistributed, x, *drawn) for x, drawn in zip(images, draws, strict=True)
            ]
        everyone = {
            name: torch.cat([
                gather(both[name == "logits"], part_sizes(length, world_size()))
                for both, length in zip(outputs, lengths, strict=True)
            ]).requires_grad_()
            for name in names
        }  # fmt: skip
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

    def state_dict(self) -> dict[str, Any]:
        """The state to go on from, as plain tensors and numbers. Every rank must call it."""
        return {
            "model": with_mean_statistics(self.model),
            **({} if self.ema is None else {"ema": with_mean_statistics(self.ema.model)}),
            "local_statistics": [local_statistics(model) for model in self._models],
            "loss": self.loss.state_dict(),
            "optimizer": self._descent.optimizer.state_dict(),
            "sums": self.sums.of_each_rank(),
            "class_means": self.class_means,
            "inputs": self.inputs._asdict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.model.load_state_dict(state["ema"])
        for model, statistics in zip(self._models, state["local_statistics"], strict=True):
            load_local_statistics(model, statistics)
        self.loss.load_state_dict(state["loss"])
        self._descent.optimizer.load_state_dict(state["optimizer"])
        self.sums.load(state["sums"])
        self.class_means = state["class_means"]

    @property
    def _models(self) -> list[nn.Module]:
        """Each with running statistics of its own."""
        return [self.model] if self.ema is None else [self.model, self.ema.model]

    def equal_on_all_ranks(self) -> dict[str, Tensor]:
        """The tensors that training changes alike on every rank, to the last bit: weights and centres."""
        return {**dict(self.model.named_parameters()), **self.loss.state_dict()}

    def end_epoch(self) -> dict[str, float | None]:
        """Figures of the epoch's training, equal on every rank; the next epoch's sums start at zero."""
        for model in self._models:
            average_running_statistics(model)
        total = self.sums.total()
        self.class_means = total["by_class"][:, 1:] / total["by_class"][:, :1]
        self.sums.clear()
        figures = self.sums.metrics(total)
        return {"loss": self.loss.total(figures), **figures}
