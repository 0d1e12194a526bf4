"""Images mixed with their neighbours in the batch, and their labels with them: mixup and cutmix."""

import numpy as np
import torch
from torch import Tensor

from dlops_dist.config import Augment
from dlops_dist.data.draws import drawn

QUANTILES = 4097
"""Of the share of an image's own."""


class Mixer:
    """Mixes each image with the one that follows it in the global batch, and the parts of its classes.

        x = l x_i + (1 - l) x_{i+1}  (mixup, Zhang et al. 2018), or x_i with a box of x_{i+1}  (cutmix, Yun et al. 2019)
        t = l [y_i] + (1 - l) [y_{i+1}]

    l is the larger of l and 1 - l that Beta(alpha, alpha) gives, so that an image's own label is its main one.
    """

    def __init__(self, chosen: Augment, num_classes: int, device: torch.device) -> None:
        self._mixup, self._cutmix = (
            quantiles(alpha).to(device) if alpha else None for alpha in (chosen.mixup, chosen.cutmix)
        )
        self._classes = torch.arange(num_classes, device=device)

    def __call__(
        self, images: Tensor, ids: Tensor, labels: Tensor, following: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Images (n, H, W, C) in [0, 255], and parts of classes (n, num_classes), both float32.

        Args:
            images: uint8 (n + 1, H, W, C): the last one follows the last of the n.
            ids, labels: (n,) of the samples; `following` are the labels of those after them.
            keys: of the epoch.
        """
        own, other = images[:-1].float(), images[1:].float()
        coin, at, *place = drawn(keys, "mix", ids, 4).unbind(dim=1)
        x, share = own, torch.ones_like(coin)
        if self._mixup is not None:
            share = _at(self._mixup, at)
            x = own * share[:, None, None, None] + other * (1 - share)[:, None, None, None]
        if self._cutmix is not None:
            cut, own_part = _with_box(own, other, (1 - _at(self._cutmix, at)).sqrt(), place)
            chosen = coin < (0.5 if self._mixup is not None else 1)
            x = torch.where(chosen[:, None, None, None], cut, x)
            share = torch.where(chosen, own_part, share)
        ours, theirs = ((y[:, None] == self._classes).float() for y in (labels, following))
        return x, ours * share[:, None] + theirs * (1 - share)[:, None]


def _with_box(own: Tensor, other: Tensor, side: Tensor, place: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Each of (n, H, W, C) with a box of the other, its sides so large a part of the image's; what is left of it."""
    axes, area = [], torch.ones_like(side)
    for draw, size in zip(place, own.shape[1:3], strict=True):
        length = (side * size).round()
        first = (draw * (size - length + 1)).floor()[:, None]
        pixel = torch.arange(size, device=own.device)
        axes.append((pixel >= first) & (pixel < first + length[:, None]))
        area = area * (length / size)
    inside = axes[0][:, :, None] & axes[1][:, None, :]
    return torch.where(inside[..., None], other, own), 1 - area


def _at(table: Tensor, uniform: Tensor) -> Tensor:
    """Where uniform numbers in [0, 1) fall among quantiles."""
    place = uniform * (len(table) - 1)
    low = place.long()
    return table[low] + (place - low) * (table[low + 1] - table[low])


def quantiles(alpha: float) -> Tensor:
    """float32 (T,) of max(l, 1 - l), l after Beta(alpha, alpha): from 1/2 to 1.

    The density is integrated over v = l^alpha, where it has no pole.
    """
    v = np.linspace(0, 0.5**alpha, QUANTILES)
    density = (1 - v ** (1 / alpha)) ** (alpha - 1)
    reached = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    smaller = np.interp(np.linspace(0, 1, QUANTILES), reached / reached[-1], v ** (1 / alpha))
    return torch.from_numpy((1 - smaller[::-1]).astype(np.float32))
