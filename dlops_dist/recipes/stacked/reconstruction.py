"""One step of an autoencoder, or of all of them unrolled, and how well they reconstruct."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from dlops_dist.data.augment import Augmenter
from dlops_dist.data.corruption import corrupted
from dlops_dist.data.loader import Batch
from dlops_dist.data.order import Ids
from dlops_dist.data.readers import Reader
from dlops_dist.distributed.collectives import all_sum
from dlops_dist.distributed.objective import global_objective
from dlops_dist.engine.descent import Descent
from dlops_dist.engine.epoch_sums import RankSums
from dlops_dist.engine.evaluation import evaluated_blocks, read_blocks
from dlops_dist.engine.numerics import compiles, precision_of
from dlops_dist.engine.samples import Inputs
from dlops_dist.losses import ReconstructionLoss
from dlops_dist.models.autoencoder import StackedAutoencoder
from dlops_dist.recipes.q2 import Settings
from dlops_dist.recipes.stacked.codes import Codes, FlatPixels

LOSS = "reconstruction"


class ReconstructionLearner:
    """Trains one layer of a stack, or all of it, to reconstruct its inputs, on this rank.

    Args:
        codes: of the layers below.
        layer: which one, from 0; None for the whole stack, unrolled. Layers below it stay as they are.
    """

    def __init__(
        self, settings: Settings, inputs: Inputs, stack: StackedAutoencoder, codes: Codes, layer: int | None,
        steps_per_epoch: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.settings, self.inputs, self.device = settings, inputs, device
        self.dtype, self.autocast = precision_of(settings, device)
        self.model, self.depth = stack, layer or 0
        self.loss, self.sums = ReconstructionLoss(), ReconstructionSums(device)
        self.power = 1.0
        """Mean square of the inputs; `measure` finds it."""
        self._codes = codes
        self.flat_pixels = FlatPixels(inputs, self.dtype).to(device)
        self._augmenter = Augmenter(
            settings.augment, settings.seed, inputs.mean, device, compiles(settings, device)
        )  # fmt: skip
        self._trained: nn.Module = stack if layer is None else stack[layer]
        self.model.eval()
        chosen = settings.pretrain
        epochs = chosen.joint_epochs if layer is None else chosen.epochs
        self._descent = Descent(self._trained, settings, chosen.optimizer, epochs, steps_per_epoch, device)

    def lr(self, step: int) -> float:
        """Learning rate of a step, counted from 0 over all epochs of the stage."""
        return self._descent.lr(step)

    def step(
        self, micro_batches: Sequence[Batch], epoch: int, step: int, figures: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Train on this rank's parts of a global batch. Returns the mean squared error over the whole of it.

        What is back-propagated is the error as a part of the inputs' mean square, so that one learning rate serves
        layers of any width and inputs of any size.
        """
        if not self._trained.training:  # going through all modules takes longer than a step of a small layer
            self._descent.distributed.train()
        self._descent.forget_gradients()
        sizes = [len(batch.labels) for batch in micro_batches]
        shares = [size / sum(sizes) for size in sizes]
        values = []
        for i, batch in enumerate(micro_batches):
            inputs = self.inputs_of(self._augmented(batch, epoch))
            seen = self._corrupted(inputs, batch.ids, epoch)
            self._descent.settle(lambda seen=seen: [self._forward(self._descent.distributed, seen)])  # type: ignore[misc]
            with self._descent.exchanged(now=i == len(micro_batches) - 1):
                reconstructions = self._forward(self._descent.distributed, seen)
                terms = {LOSS: self.loss.terms(reconstructions, inputs)}
                objective = global_objective(terms, {LOSS: 1 / self.power}, shares[i])
                objective.backward()
            values.append(objective.values[LOSS])
        self._descent.step(step, figures)
        value = reduce(torch.add, values)
        self.sums.add(value, sum(len(batch.ids) for batch in micro_batches))
        return value

    def inputs_of(self, images: Tensor) -> Tensor:
        """What the trained part sees, (N, D), of uint8 images or of kept codes."""
        if images.dtype != torch.uint8:
            return images
        if self.depth:
            return self._codes.encode(images, self.depth)
        return self.flat_pixels(images)

    def _augmented(self, batch: Batch, epoch: int) -> Tensor:
        """The first layer and the whole stack see changing images; layers between, codes of images as they are."""
        return batch.images if self.depth else self._augmenter(batch.images, batch.ids, epoch)

    def _corrupted(self, inputs: Tensor, ids: Tensor, epoch: int) -> Tensor:
        chosen = self.settings.pretrain
        return corrupted(inputs, ids, self.settings.seed, epoch, chosen.corruption, chosen.corruption_level)

    def _forward(self, network: nn.Module, inputs: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext():
            return network(inputs)

    @torch.no_grad()
    def measure(self, reader: Reader, ids: Ids) -> None:
        """Find the mean square of some samples' inputs. Every rank reads all of them, and finds the same bits."""
        self.model.eval()
        parts, _ = evaluated_blocks(ids)
        means = [self.inputs_of(batch.images).double().square().mean() for batch in read_blocks(self, reader, parts)]
        self.power = torch.stack(means).mean().clamp(min=1e-12).item()

    @torch.no_grad()
    def error(self, reader: Reader, ids: Ids) -> dict[str, float]:
        """How well some samples are reconstructed, as they are. Sums are float64, added in block order.

        loss            mean squared error of the inputs
        relative_loss   the same, as a part of the training inputs' mean square: what layers are compared by
        """
        self.model.eval()
        parts, mine = evaluated_blocks(ids)
        rows = torch.zeros(len(parts), 2, dtype=torch.float64, device=self.device)
        for place, batch in enumerate(read_blocks(self, reader, parts[mine]), mine.start):
            inputs = self.inputs_of(batch.images)
            terms = self.loss.terms(self._forward(self._trained, inputs), inputs)
            rows[place, 0], rows[place, 1] = terms.sum, terms.count
        total, count = all_sum(rows).cpu().cumsum(dim=0)[-1].tolist()
        return {"loss": total / count, "relative_loss": total / count / self.power}

    def state_dict(self) -> dict[str, Any]:
        """The state to go on from: the whole stack, which later stages need too. Every rank must call it."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self._descent.optimizer.state_dict(),
            "sums": self.sums.of_each_rank(),
            "inputs": self.inputs._asdict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self._descent.optimizer.load_state_dict(state["optimizer"])
        self.sums.load(state["sums"])

    def equal_on_all_ranks(self) -> dict[str, Tensor]:
        """The tensors that training changes alike on every rank, to the last bit."""
        return dict(self._trained.named_parameters())

    def end_epoch(self) -> dict[str, float]:
        """Figures of the epoch's training, equal on every rank; the next epoch's sums start at zero."""
        samples, loss = self.sums.total()["counts"].tolist()
        self.sums.clear()
        return {"loss": loss / samples}


class ReconstructionSums(RankSums):
    """Samples, and the loss summed over them."""

    def __init__(self, device: torch.device) -> None:
        counts = torch.zeros(2, dtype=torch.float64, device=device)
        self._samples, self._loss = counts.unbind()  # what is added to them is in `counts`
        super().__init__(counts=counts)

    def add(self, value: Tensor, number: int) -> None:
        self._samples += number
        self._loss.add_(value, alpha=number)
