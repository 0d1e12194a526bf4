"""An autoencoder in training, or all of them unrolled, and how well they reconstruct."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dlops_dist.data.augment import Augmenter
from dlops_dist.data.corruption import corrupted
from dlops_dist.data.loader import Batch
from dlops_dist.data.order import Ids
from dlops_dist.data.random_crops import in_epoch
from dlops_dist.data.readers import Reader
from dlops_dist.engine.descent import Descent
from dlops_dist.engine.epoch_sums import EpochSums
from dlops_dist.engine.evaluation import device_sums, evaluated_blocks, figures_of_sums, read_blocks
from dlops_dist.engine.losses import Losses
from dlops_dist.engine.mined import Outputs
from dlops_dist.engine.numerics import compiles, precision_of
from dlops_dist.engine.samples import Inputs
from dlops_dist.engine.step import Seen, Step
from dlops_dist.losses import ReconstructionLoss
from dlops_dist.models.autoencoder import StackedAutoencoder
from dlops_dist.recipes.stacked.codes import Codes, FlatPixels
from dlops_dist.recipes.stacked.settings import Stack


class ReconstructionLearner(Step):
    """Trains one layer of a stack, or all of it, to reconstruct its inputs.

    What is back-propagated is the error as a part of the inputs' mean square, so that one learning rate serves layers
    of any width and inputs of any size.

    Args:
        codes: of the layers below.
        layer: which one, from 0; None for the whole stack, unrolled. Layers below it stay as they are.
    """

    def __init__(
        self, settings: Stack, inputs: Inputs, stack: StackedAutoencoder, codes: Codes, layer: int | None,
        steps_per_epoch: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.dtype, self.autocast = precision_of(settings, device)
        self.depth, self._codes, self._chosen = layer or 0, codes, settings.pretrain
        self.flat_pixels = FlatPixels(inputs, self.dtype).to(device)
        self._augmenter = Augmenter(settings.augment, settings.seed, inputs.mean, device, compiles(settings, device))
        self._trained: nn.Module = stack if layer is None else stack[layer]
        stack.eval()
        epochs = self._chosen.joint_epochs if layer is None else self._chosen.epochs
        descent = Descent(self._trained, settings, self._chosen.optimizer, epochs, steps_per_epoch, device)
        loss = Losses({"loss": (1.0, ReconstructionLoss())})
        super().__init__(
            settings, inputs, device, stack, loss, descent, EpochSums(["loss"], [], device, descent.plan.blocks)
        )

    def in_epoch(self, reader: Reader, epoch: int) -> Reader:
        return reader if self.depth else in_epoch(reader, self.settings.augment, self.settings.seed, epoch)

    def seen(self, batch: Batch, epoch: int) -> Seen:
        """The first layer and the whole stack see changing images; layers between, codes of images as they are."""
        images = batch.images if self.depth else self._augmenter(batch.images, batch.ids, epoch)
        inputs, chosen = self.inputs_of(images), self._chosen
        spoiled = corrupted(
            inputs, batch.ids, self.settings.seed, epoch, chosen.corruption, chosen.corruption_level
        )  # fmt: skip
        return Seen((spoiled,), inputs)

    def inputs_of(self, images: Tensor) -> Tensor:
        """What the trained part sees, (N, D), of uint8 images or of kept codes."""
        if images.dtype != torch.uint8:
            return images.clone()  # where its rows lie may decide how their products with weights are rounded
        if self.depth:
            return self._codes.encode(images, self.depth)
        return self.flat_pixels(images)

    def outputs(self, network: nn.Module, inputs: Sequence[Tensor]) -> Outputs:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return {"reconstructions": network(*inputs)}

    def judged(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Reconstructions of images as they are."""
        inputs = self.inputs_of(batch.images)
        return self.outputs(self._trained, [inputs]), inputs

    @torch.no_grad()
    def measure(self, reader: Reader, ids: Ids) -> None:
        """Find the mean square of some samples' inputs. Every rank reads all of them, and finds the same bits."""
        self.model.eval()
        parts, _ = evaluated_blocks(ids)
        means = [self.inputs_of(batch.images).double().square().mean() for batch in read_blocks(self, reader, parts)]
        self.power = torch.stack(means).mean().clamp(min=1e-12).item()
        self.loss.backward_weights["loss"] = 1 / self.power

    def error(self, reader: Reader, ids: Ids) -> dict[str, Any]:
        """How well some samples are reconstructed, as they are. Sums are float64, added in block order.

        loss            mean squared error of the inputs
        relative_loss   the same, as a part of the training inputs' mean square: what layers are compared by
        """
        self.model.eval()
        figures = figures_of_sums(self, reader, ids, {}, device_sums(self, reader, ids, {}))
        return figures | {"relative_loss": (figures["loss"] or 0.0) / self.power}
