"""A loss before its division: what every loss gives, so that any share of the samples can be added up."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """Sum of a loss's terms and how many they are; the loss is sum / max(count, 1), over all ranks."""

    sum: Tensor
    """Scalar, with gradient, at least float32."""
    count: Tensor
    """Scalar float64, without gradient."""

    def mean(self) -> Tensor:
        """The single-process loss."""
        return self.sum / self.count.clamp(min=1).to(self.sum.dtype)


def count_of(number: int, like: Tensor) -> Tensor:
    """A count as Terms holds it, on the device of `like`."""
    return torch.tensor(float(number), dtype=torch.float64, device=like.device)


def at_least_float32(x: Tensor) -> Tensor:
    """Losses are computed in float32 under mixed precision, and in float64 with a float64 model."""
    return x if x.dtype == torch.float64 else x.float()
