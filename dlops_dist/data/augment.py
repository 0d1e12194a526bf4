"""Batches of uint8 images into what the model sees, on the device. Random changes are keyed by sample."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dlops_dist.data.draws import uniform
from dlops_dist.data.keys import key


def crop_and_flip(images: Tensor, ids: Tensor, seed: int, epoch: int, padding: int, flip: bool) -> Tensor:
    """Pad uint8 images (N, H, W, C) by zeros, crop each at its own place back to (H, W), mirror every second.

    One gather moves each pixel once. Place and mirroring depend on (seed, epoch, id) alone.
    """
    n, height, width, _ = images.shape
    rows = torch.arange(height, device=images.device).expand(n, height)
    columns = torch.arange(width, device=images.device).expand(n, width)
    if flip:
        mirrored = uniform(key(seed, epoch, "flip"), ids, 1) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    if padding:
        images = F.pad(images, (0, 0, padding, padding, padding, padding))
        offset = (uniform(key(seed, epoch, "crop"), ids, 2) * (2 * padding + 1)).long()
        rows, columns = rows + offset[:, :1], columns + offset[:, 1:]
    if not (flip or padding):
        return images
    sample = torch.arange(n, device=images.device)[:, None, None]
    return images[sample, rows[:, :, None], columns[:, None, :]]


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """(x / 255 - mean) / std of uint8 (N, H, W, C), as channels-last (N, C, H, W) of a floating dtype."""
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=dtype, device=images.device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=dtype, device=images.device)
    return torch.addcmul(shift, images.to(dtype), scale).permute(0, 3, 1, 2)
