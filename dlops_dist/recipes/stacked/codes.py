"""What each layer of a stack is trained on: pixels, or the codes of the frozen layers below it."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from dlops_dist.data.augment import Normalize
from dlops_dist.data.loader import read_ahead
from dlops_dist.data.order import blocks
from dlops_dist.data.readers import Reader, on_device
from dlops_dist.distributed.collectives import gather, rank, world_size
from dlops_dist.engine.numerics import precision_of
from dlops_dist.engine.samples import Inputs
from dlops_dist.models.autoencoder import StackedAutoencoder
from dlops_dist.recipes.stacked.settings import Stack

BLOCK = 256
"""Samples that are encoded together: fixed, so that no bit of a code depends on the number of ranks."""


class CodeReader:
    """Codes of all samples of a split, in the memory of the device; read as images are."""

    in_memory = True

    def __init__(self, labels: np.ndarray, codes: Tensor) -> None:
        self.labels, self.codes = labels, codes

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, ids: np.ndarray) -> np.ndarray | Tensor:
        """(n, D)."""
        if self.codes.is_cpu:
            return self.codes.numpy().take(ids, axis=0)  # torch would start threads for it
        return self.codes[on_device(ids, self.codes.device)]


class Codes:
    """Readers of some splits at each depth of a stack.

    Codes are computed once for each depth, from those of the depth below where they are at hand, and kept on every
    rank where they fit into `pretrain.codes_gb`; else the readers are those of pixels, and learners encode in every
    step. Only the codes of one depth are kept; of two, while one is made from the other.
    """

    def __init__(
        self, settings: Stack, inputs: Inputs, stack: StackedAutoencoder, pixels: Mapping[str, Reader],
        device: torch.device, tell: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._settings, self._stack, self._pixels = settings, stack, pixels
        self._device, self._tell = device, tell
        self._dtype, self._autocast = precision_of(settings, device)
        self._flat = FlatPixels(inputs, self._dtype).to(device)
        self._depth, self._kept = 0, pixels
        self._told = 0

    def at(self, depth: int) -> Mapping[str, Reader]:
        """Readers of each split's inputs for the layer on top of `depth` others. Every rank must call it."""
        if depth == 0:
            self._depth, self._kept = 0, self._pixels
        if depth == self._depth:
            return self._kept
        num_samples, width = sum(map(len, self._pixels.values())), self._settings.model.layers[depth - 1]
        size, limit = num_samples * width * self._dtype.itemsize / 1e9, self._settings.pretrain.codes_gb
        codes = f"layer {depth + 1}: the codes of {num_samples:,} images below it ({size:.2f} GB)"
        if size > limit:
            if depth != self._told:
                self._tell(f"{codes} are computed in every step: pretrain.codes_gb is {limit:g}")
            self._told = depth
            return self._pixels
        self._tell(f"{codes} are kept in each worker's memory")
        chained = self._depth == depth - 1
        below = self._kept if chained else self._pixels
        self._kept = {name: self._encoded(reader, depth, width) for name, reader in below.items()}
        self._depth = depth
        return self._kept

    def encode(self, images: Tensor, depth: int) -> Tensor:
        """Codes (N, K) at a depth of uint8 images (N, H, W, C), or of codes that are kept; without gradient."""
        with torch.no_grad(), torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            if images.dtype == torch.uint8:
                return self._stack.encode(self._flat(images), depth).to(self._dtype)
            for encoder in self._stack.encoders[self._depth : depth]:
                images = encoder(images)
            return images.to(self._dtype)

    def _encoded(self, reader: Reader, depth: int, width: int) -> CodeReader:
        """Codes of all samples of a split. Of each `world_size` blocks every rank computes one, and all get all."""
        self._stack.eval()
        parts = blocks(np.arange(len(reader)), BLOCK)
        own = ((block, slice(0, len(block))) for block in parts[rank() :: world_size()])
        data = self._settings.data
        batches = read_ahead(reader, own, self._device, data.threads, data.prefetch)
        codes = torch.empty(len(reader), width, dtype=self._dtype, device=self._device)
        for first in range(0, len(parts), world_size()):
            together = parts[first : first + world_size()]
            sizes = [len(block) for block in together] + [0] * (world_size() - len(together))
            if sizes[rank()]:
                part = self.encode(next(batches).images, depth)
            else:
                part = torch.empty(0, width, dtype=self._dtype, device=self._device)
            codes[together[0][0] : together[-1][-1] + 1] = gather(part, sizes)
        return CodeReader(reader.labels, codes)


class FlatPixels(nn.Module):
    """(N, H W C) of the model's type from uint8 (N, H, W, C)."""

    def __init__(self, inputs: Inputs, dtype: torch.dtype) -> None:
        super().__init__()
        self.normalize = Normalize(inputs.mean, inputs.std, dtype)

    def forward(self, images: Tensor) -> Tensor:
        return self.normalize(images).permute(0, 2, 3, 1).flatten(1)
