"""A recipe's own changes of its training images: a function of keyed numbers, or any transform of one image."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlops_dist.data.draws import uniform
from dlops_dist.data.keys import key, mix
from dlops_dist.errors import RunError

ONE_AT_A_TIME = Lock()
"""There is one random state for all threads."""


class Keyed:
    """A function of uint8 images (N, H, W, 3) and uniform numbers (N, num_draws) in [0, 1), keyed by sample.

    It must make of each image what its own numbers say: images of the same kind, on their device.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], num_draws: int) -> None:
        self.function, self.num_draws = function, num_draws


def transformed(change: Callable[..., Any] | Keyed, images: Tensor, ids: Tensor, seed: int, epoch: int) -> Tensor:
    """uint8 images (N, H, W, 3), changed by what is drawn for (seed, epoch, sample).

    Args:
        change: `Keyed`, or any callable that takes a uint8 image (3, H, W) and gives one, a transform of
            torchvision.transforms.v2 say: it finds torch's, numpy's and Python's random state set for its sample.

    Raises:
        RunError: it gives something else.
    """
    stream = key(seed, epoch, "transform")
    if isinstance(change, Keyed):
        changed = change.function(images, uniform(stream, ids, change.num_draws))
    else:
        channels_first = images.permute(0, 3, 1, 2)
        with _random_states_kept():
            parts = [_alone(change, image, mix(stream ^ number)) for image, number in zip(
                channels_first, ids.tolist(), strict=True)]  # fmt: skip
        changed = torch.stack(parts).permute(0, 2, 3, 1).contiguous() if parts else images
    if not isinstance(changed, Tensor) or (changed.shape, changed.dtype) != (images.shape, torch.uint8):
        raise RunError(_refusal(changed, images[0].shape if len(images) else images.shape))
    return changed


def _alone(change: Callable[..., Any], image: Tensor, seed: int) -> Tensor:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    changed = change(image)
    if not isinstance(changed, Tensor) or (changed.shape, changed.dtype) != (image.shape, torch.uint8):
        raise RunError(_refusal(changed, image.shape))
    return changed


def _refusal(changed: Any, shape: torch.Size) -> str:
    given = f"{changed.dtype} {tuple(changed.shape)}" if isinstance(changed, Tensor) else type(changed).__name__
    return f"augment gave {given} of images uint8 {tuple(shape)}: it must keep type and size; the engine normalises"


@contextmanager
def _random_states_kept() -> Iterator[None]:
    with ONE_AT_A_TIME:
        python, numpy = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
