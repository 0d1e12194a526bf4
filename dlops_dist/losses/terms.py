"""A loss before its division: what every loss gives, so that any share of the samples can be added up."""

from dataclasses import dataclass

import torch
from torch import Tensor

Count = int | Tensor


@dataclass(frozen=True)
class Terms:
    """Sum of a loss's terms and how many they are; the loss is sum / max(count, 1), over all ranks."""

    sum: Tensor
    """Scalar, with gradient, at least float32."""
    count: Count
    """A number where it is known beforehand, else a scalar float64 without gradient."""

    def mean(self) -> Tensor:
        """The single-process loss."""
        return (self.sum / at_least_one(self.count)).to(self.sum.dtype)


def at_least_one(count: Count) -> Count:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def at_least_float32(x: Tensor) -> Tensor:
    """Losses are computed in float32 under mixed precision, and in float64 with a float64 model."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
