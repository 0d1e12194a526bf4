"""Random numbers on the device, one row for each sample: equal whoever draws them, in any batch."""

import torch
from torch import Tensor

from dlops_dist.data.keys import GOLDEN, MIX_1, MIX_2, PURPOSES, key

PER_GOLDEN = pow(GOLDEN, -1, 2**64)
"""Draws are counted before they are multiplied by GOLDEN: Triton folds a constant product of an arange into 32 bits."""

VIEW = 2**40
"""Ids of a sample's views lie so far apart."""


def epoch_keys(seed: int, epoch: int, device: torch.device | None = None) -> Tensor:
    """The key of each purpose, (P,) int64: a compiled function takes them like images, and any epoch's alike."""
    keys = torch.tensor([_signed(key(seed, epoch, purpose)) for purpose in PURPOSES])
    return keys.to(device, non_blocking=True)


def drawn(keys: Tensor, purpose: str, ids: Tensor, num_draws: int) -> Tensor:
    """`uniform` by the key of a purpose among an epoch's."""
    return uniform(keys[PURPOSES.index(purpose)], ids, num_draws)


def uniform(key: int | Tensor, ids: Tensor, num_draws: int) -> Tensor:
    """Uniform numbers in [0, 1), float32 (N, num_draws), for sample ids (N,).

    Counter-based: draw j of sample i is the top 24 bits of mix(mix(key + i) + (j + 1) GOLDEN).
    """
    stream = _mix(ids + (_signed(key) if isinstance(key, int) else key))[:, None]
    counters = torch.arange(1, num_draws + 1, device=ids.device)
    counted = (stream * _signed(PER_GOLDEN) + counters) * _signed(GOLDEN)
    return _shift_right(_mix(counted), 40).float() * 2**-24


def _mix(x: Tensor) -> Tensor:
    """`keys.mix` on int64, whose sums and products wrap around as unsigned ones do."""
    x = (x ^ _shift_right(x, 30)) * _signed(MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(MIX_2)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own repeats the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x
