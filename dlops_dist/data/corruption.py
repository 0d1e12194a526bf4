"""Inputs spoiled on purpose, for autoencoders that learn to repair them (Vincent et al. 2010, section 3)."""

import math
from typing import Literal

import torch
from torch import Tensor

from dlops_dist.data.draws import uniform
from dlops_dist.data.keys import key

Corruption = Literal["none", "masking", "gaussian"]
ROWS_AT_ONCE = 4
"""On a CPU: random numbers of so many samples stay in the cache while they are made."""


def corrupted(x: Tensor, ids: Tensor, seed: int, epoch: int, kind: Corruption, level: float) -> Tensor:
    """A copy of x (N, D) with a share `level` of its values set to 0 (masking), or with noise of that deviation added.

    What happens to a sample depends on (seed, epoch, id) alone.
    """
    if kind == "none" or not level:
        return x
    draw = _kept if kind == "masking" else _normal
    some = ids.split(ROWS_AT_ONCE) if x.device.type == "cpu" else [ids]
    parts = [draw(key(seed, epoch, "corruption"), part, x.shape[1], level) for part in some]
    drawn = torch.cat(parts).to(x.dtype)
    return x * drawn if kind == "masking" else torch.add(x, drawn, alpha=level)


def _kept(corruption_key: int, ids: Tensor, num_inputs: int, level: float) -> Tensor:
    """Boolean (N, D): what is not set to 0."""
    return uniform(corruption_key, ids, num_inputs) >= level


def _normal(corruption_key: int, ids: Tensor, num_inputs: int, _: float) -> Tensor:
    """Normal numbers (N, D), pairs of them from pairs of uniform ones (Box & Muller 1958)."""
    first, second = uniform(corruption_key, ids, 2 * math.ceil(num_inputs / 2)).chunk(2, dim=1)
    radius, angle = (-2 * (-first).log1p()).sqrt(), 2 * math.pi * second
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :num_inputs]
