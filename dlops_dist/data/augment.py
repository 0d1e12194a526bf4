"""Batches of uint8 images into what the model sees, on the device. Random changes are keyed by sample.

No function here waits for a GPU: what it takes of the host lies on the device already.

Whatever is drawn for a sample depends on (seed, epoch, id) alone, and what is made of it on its own pixels alone, to
the last bit: only integer sums, and operations that IEEE 754 rounds correctly wherever in a batch they fall.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn
from torch.nn import functional as F

from dlops_dist.config import Augment
from dlops_dist.data.draws import drawn, epoch_keys
from dlops_dist.data.transforms import transformed

LUMA = (77, 150, 29)
"""Weights of red, green and blue in 256ths (ITU-R BT.601)."""
LEAST_SIDE_RATIO = 3 / 4


class Augmenter:
    """The chosen changes of a run's training images, on one device.

    Args:
        mean: of each channel, as a part of 255: what fills a cutout.
        compiled: fuse them into few kernels, where these cannot round otherwise.
        more: of a recipe, after the chosen ones, as `transformed` takes it.
    """

    def __init__(
        self, chosen: Augment, seed: int, mean: Sequence[float], device: torch.device, compiled: bool = False,
        more: Callable[..., Any] | None = None,
    ) -> None:  # fmt: skip
        fill = torch.tensor([round(255 * m) for m in mean], dtype=torch.uint8, device=device)

        def changed(images: Tensor, ids: Tensor, keys: Tensor) -> Tensor:
            return augment(images, ids, keys, chosen, fill)

        whole_numbers = (chosen.resized_crop is None or chosen.size is not None) and not _colors(chosen)
        self._changed = torch.compile(changed, dynamic=False) if compiled and whole_numbers else changed
        self._seed, self._device, self._more = seed, device, more
        self._keys: tuple[int, Tensor] | None = None

    def __call__(self, images: Tensor, ids: Tensor, epoch: int) -> Tensor:
        """uint8 images (N, H, W, 3) of the samples with these ids (N,), as the epoch sees them."""
        images = self._changed(images, ids, self.keys(epoch))
        return images if self._more is None else transformed(self._more, images, ids, self._seed, epoch)

    def keys(self, epoch: int) -> Tensor:
        """Of the epoch, on the device."""
        if self._keys is None or self._keys[0] != epoch:
            self._keys = epoch, epoch_keys(self._seed, epoch, self._device)
        return self._keys[1]


def augment(images: Tensor, ids: Tensor, keys: Tensor, chosen: Augment, fill: Tensor) -> Tensor:
    """The chosen changes of uint8 images (N, H, W, 3), in this order: crop and flip, colours, cutout.

    Args:
        ids: (N,) of the samples.
        keys: of the epoch; all functions here take them.
        fill: colour of a cutout, uint8 (3,).
    """
    if chosen.resized_crop is None:
        images = crop_and_flip(images, ids, keys, chosen.crop_padding, chosen.flip)
    elif chosen.size is None:  # else that was done as they were decoded
        images = random_resized_crop(images, ids, keys, chosen.resized_crop)
        images = crop_and_flip(images, ids, keys, 0, chosen.flip)
    if _colors(chosen):
        images = color_jitter(images, ids, keys, (chosen.brightness, chosen.contrast, chosen.saturation))
    if chosen.cutout:
        images = cutout(images, ids, keys, chosen.cutout, fill)
    return images


def _colors(chosen: Augment) -> bool:
    return bool(chosen.brightness or chosen.contrast or chosen.saturation)


def crop_and_flip(images: Tensor, ids: Tensor, keys: Tensor, padding: int, flip: bool) -> Tensor:
    """Pad uint8 images (N, H, W, C) by zeros, crop each at its own place back to (H, W), mirror every second."""
    if not (flip or padding):
        return images
    _, height, width, _ = images.shape
    offset = (drawn(keys, "crop", ids, 2) * (2 * padding + 1)).long()
    mirrored = (drawn(keys, "flip", ids, 1)[:, 0] < 0.5) & flip
    if padding:
        images = F.pad(images, (0, 0, padding, padding, padding, padding))
    cut = _cut_by_gather if images.is_cuda or torch.compiler.is_compiling() else _cut_by_windows
    return cut(images, offset, mirrored, height, width)


def _cut_by_windows(images: Tensor, offset: Tensor, mirrored: Tensor, height: int, width: int) -> Tensor:
    """Each image's part at its offset (N, 2), mirrored or not. Copies rows of bytes: ten times faster on a CPU."""
    n, _, _, channels = images.shape
    windows = sliding_window_view(images.flatten(2).numpy(), (height, width * channels), axis=(1, 2))
    top, left = offset.numpy().T
    parts = windows[np.arange(n), top, left * channels].reshape(n, height, width, channels)
    turned = mirrored.numpy()
    parts[turned] = torch.from_numpy(parts[turned]).flip(2)  # ten times faster than numpy's
    return torch.from_numpy(parts)


def _cut_by_gather(images: Tensor, offset: Tensor, mirrored: Tensor, height: int, width: int) -> Tensor:
    """The same of all images at once, for a GPU or a compiler."""
    rows = torch.arange(height, device=images.device) + offset[:, :1]
    columns = torch.arange(width, device=images.device).expand(len(images), width)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + offset[:, 1:]
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    return images[sample, rows[:, :, None], columns[:, None, :]]


def random_resized_crop(images: Tensor, ids: Tensor, keys: Tensor, least_area: float) -> Tensor:
    """Cut a part out of each uint8 image (N, H, W, C) and enlarge it to (H, W), bilinearly.

    Its area is drawn from [least_area, 1] of the image's, the ratio of its sides from [3/4, 1], the longer one by
    a coin, its place from where it fits (after Szegedy et al. 2015, Going Deeper with Convolutions, section 6).
    """
    _, height, width, _ = images.shape
    area, ratio, wide, *place = drawn(keys, "resized crop", ids, 5).unbind(dim=1)
    area = (least_area + (1 - least_area) * area) * (height * width)
    ratio = LEAST_SIDE_RATIO + (1 - LEAST_SIDE_RATIO) * ratio
    short, long = (area * ratio).sqrt(), (area / ratio).sqrt()
    sides = [torch.where(wide < 0.5, short, long), torch.where(wide < 0.5, long, short)]
    axes = []  # where the centre of each row and column of the result falls, from -1 to 1 over the image
    for side, at, size in zip(sides, place, (height, width), strict=True):
        cut = side.round().clamp(1, size)
        first = (at * (size - cut + 1)).floor()
        centers = torch.arange(size, device=images.device) + 0.5
        axes.append((first[:, None] + centers * (cut / size)[:, None]) * (2 / size) - 1)
    y, x = axes
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    pixels = images.permute(0, 3, 1, 2).float()
    enlarged = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return enlarged.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def color_jitter(images: Tensor, ids: Tensor, keys: Tensor, strengths: tuple[float, float, float]) -> Tensor:
    """Change brightness b, contrast c and saturation s of each uint8 image (N, H, W, 3).

        x <- b c (s x + (1 - s) luma(x)) + (1 - c) b mean(luma),    b, c, s from [1 - strength, 1 + strength]

    which is one after the other without rounding or clipping in between.
    """
    draws = drawn(keys, "colors", ids, 3)[..., None, None, None].unbind(dim=1)
    spread = np.array(strengths, np.float32)
    least = 1 - spread
    b, c, s = (draw * float(2 * x) + float(low) for draw, x, low in zip(draws, spread, least, strict=True))
    pixels = images.permute(0, 3, 1, 2).contiguous().float()
    red, green, blue = (weight * plane for weight, plane in zip(LUMA, pixels.split(1, dim=1), strict=True))
    luma = red.add_(green).add_(blue).div_(256)  # multiples of 1/256: exact, and so is their sum in float64
    mean = luma.mean(dim=(2, 3), keepdim=True, dtype=torch.float64).float()
    changed = pixels.mul_(s * b * c).add_(luma.mul_((1 - s) * b * c)).add_((1 - c) * b * mean)
    return changed.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def cutout(images: Tensor, ids: Tensor, keys: Tensor, side: int, fill: Tensor) -> Tensor:
    """Paint a square of `side` pixels around a random pixel of each uint8 image (N, H, W, C) in one colour.

    The square may reach over the edge (DeVries & Taylor 2017, Improved Regularization, section 3).
    """
    _, height, width, _ = images.shape
    draws = drawn(keys, "cutout", ids, 2)
    covered = []
    for draw, size in zip(draws.unbind(dim=1), (height, width), strict=True):
        first = (draw * size).long() - side // 2
        place = torch.arange(size, device=images.device) - first[:, None]
        covered.append((place >= 0) & (place < side))
    inside = (covered[0][:, :, None] & covered[1][:, None, :])[..., None]
    return torch.where(inside, fill, images)


class Normalize(nn.Module):
    """(x / 255 - mean) / std of images (N, H, W, C) in [0, 255], as (N, C, H, W) of a floating dtype.

    Args:
        mean, std: of each channel, as parts of 255.
        memory_format: of the result; that of the input is channels-last.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:  # fmt: skip
        super().__init__()
        scale, shift = [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
        self.register_buffer("scale", torch.tensor(scale, dtype=dtype), persistent=False)
        self.register_buffer("shift", torch.tensor(shift, dtype=dtype), persistent=False)
        self._memory_format = memory_format

    def forward(self, images: Tensor) -> Tensor:
        n, height, width, channels = images.shape
        rows = images.reshape(n, height, width * channels).to(self.scale.dtype, copy=True)  # 5 x as fast as triples
        torch.addcmul(self.shift.repeat(width), rows, self.scale.repeat(width), out=rows)  # fresh memory costs more
        return rows.view(images.shape).permute(0, 3, 1, 2).contiguous(memory_format=self._memory_format)
