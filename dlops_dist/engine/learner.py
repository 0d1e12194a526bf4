"""One training step, and all the state that it changes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dlops_dist.config import Q1
from dlops_dist.data.augment import crop_and_flip, normalize
from dlops_dist.data.loader import Batch
from dlops_dist.data.order import part_sizes
from dlops_dist.distributed.collectives import gather, world_size
from dlops_dist.distributed.norm import average_running_statistics
from dlops_dist.distributed.objective import global_objective, update_centers
from dlops_dist.engine.classification import ClassificationLoss, TwoOutputs, build_model
from dlops_dist.engine.epoch_sums import EpochSums
from dlops_dist.losses.terms import at_least_float32
from dlops_dist.optim import SGD, lr_factor


class Inputs(NamedTuple):
    """What a model must know of the data that it was trained on."""

    num_classes: int
    mean: tuple[float, ...]
    """Of each channel, as a part of 255; so is std."""
    std: tuple[float, ...]


class Learner:
    """Model, losses and optimiser of a run, on this rank.

    Everything that the next step depends on is in `state_dict`, and is the same on every rank, but for
    `sums`, which hold this rank's share of the epoch so far: of those, every rank's is in it.
    """

    def __init__(self, settings: Q1, inputs: Inputs, steps_per_epoch: int, device: torch.device) -> None:
        self.settings, self.device, self.inputs = settings, device, inputs
        self.dtype = torch.float64 if settings.precision == "float64" else torch.float32
        self.autocast = settings.precision == "bf16" or (
            settings.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
        )
        num_classes = inputs.num_classes
        self.model = build_model(settings, num_classes).to(device, self.dtype)
        self.model.to(memory_format=torch.channels_last)
        self.loss = ClassificationLoss(settings, num_classes, self.model.embedding_dim).to(device, self.dtype)
        self.optimizer = SGD(
            self.model.parameters(), settings.optimizer.lr, settings.optimizer.momentum,
            settings.optimizer.dampening, settings.optimizer.weight_decay, settings.optimizer.nesterov,
        )  # fmt: skip
        self._steps_per_epoch = steps_per_epoch
        self.sums = EpochSums(list(self.loss.weights), self.model.fc.weight)
        self.class_means = torch.full_like(self.model.fc.weight, torch.nan, requires_grad=False)
        """Mean training embedding of each class over the last whole epoch, (C, D)."""
        self.network = TwoOutputs(self.model, self.loss.detach_head)
        network: nn.Module = self.network
        compiled = settings.compile if settings.compile is not None else device.type == "cuda"
        if compiled:
            network = torch.compile(network)  # type: ignore[assignment]
        if world_size() > 1:
            network = DistributedDataParallel(network, forward_sync_buffers=False, gradient_as_bucket_view=True)
        self._trained = network

    def lr(self, step: int) -> float:
        """Learning rate of a step, counted from 0 over all epochs."""
        chosen, per_epoch = self.settings.optimizer, self._steps_per_epoch
        total = self.settings.epochs * per_epoch
        warmup = min(round(chosen.warmup_epochs * per_epoch), total // 2)
        decay = chosen.step_epochs * per_epoch
        return chosen.lr * lr_factor(step, total, chosen.schedule, warmup, decay, chosen.step_gamma)

    def prepare(self, images: Tensor) -> Tensor:
        """Normalised channels-last images of the model's type from uint8 (N, H, W, 3)."""
        return normalize(images, self.inputs.mean, self.inputs.std, self.dtype)

    def step(self, batch: Batch, epoch: int, step: int) -> Tensor:
        """Train on this rank's part of a global batch. Returns the loss over the whole batch, without gradient."""
        settings = self.settings
        images = crop_and_flip(
            batch.images, batch.ids, settings.seed, epoch, settings.augment.crop_padding, settings.augment.flip
        )
        sizes = part_sizes(len(batch.labels), world_size())
        self._trained.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            embeddings, logits = self._trained(self.prepare(images))
        embeddings = at_least_float32(embeddings)  # before ranks add up gradients of each other's rows
        everyone = gather(embeddings, sizes) if self.loss.triplet is not None else embeddings
        terms = self.loss.terms(embeddings, logits, everyone, batch.labels, batch.part)
        objective = global_objective(terms, self.loss.backward_weights)

        self.optimizer.zero_grad()
        objective.backward.backward()
        if settings.optimizer.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.optimizer.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step)
        self.optimizer.step()
        if self.loss.center is not None:
            update_centers(self.loss.center, embeddings, batch.labels, batch.part, sizes)
        self.sums.add(objective.values, embeddings.detach(), logits.detach(), batch.labels[batch.part])
        return torch.stack([objective.values[name] * weight for name, weight in self.loss.weights.items()]).sum()

    def state_dict(self) -> dict[str, Any]:
        """The state to go on from, as plain tensors and numbers. Every rank must call it."""
        return {
            "model": self.model.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sums": self.sums.of_each_rank(),
            "class_means": self.class_means,
            "inputs": self.inputs._asdict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sums.load(state["sums"])
        self.class_means = state["class_means"]

    def end_epoch(self) -> dict[str, float]:
        """Figures of the epoch's training, equal on every rank; the next epoch's sums start at zero."""
        average_running_statistics(self.model)
        total = self.sums.total()
        self.class_means = total["by_class"][:, 1:] / total["by_class"][:, :1]
        self.sums.clear()
        figures = self.sums.metrics(total)
        return {"loss": self.loss.total(figures), **figures}
