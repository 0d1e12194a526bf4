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


def checked_labels(labels: Tensor, num_samples: int, num_classes: int | None = None) -> Tensor:
    """Labels (N,) as int64. What is no class of a sample is refused: a mask, one too few or many, -1, C.

    A GPU refuses those out of range by an assertion of its own, some steps later: nobody waits for it here.

    Raises:
        ValueError: names what is wrong.
    """
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be whole numbers, not {labels.dtype}")
    if labels.shape != (num_samples,):
        raise ValueError(f"labels must have the shape ({num_samples},), one for each sample, not {tuple(labels.shape)}")
    labels = labels.long()
    if num_classes is None or not num_samples:
        return labels
    known = ((labels >= 0) & (labels < num_classes)).all()
    if labels.is_cpu and not torch.compiler.is_compiling():
        if not known:
            wrong = labels[(labels < 0) | (labels >= num_classes)][0]
            raise ValueError(f"labels must be from 0 to {num_classes - 1}, not {int(wrong)}")
    else:
        torch.ops.aten._assert_async.msg(known, f"labels must be from 0 to {num_classes - 1}")
    return labels


def nan_unless_finite(x: Tensor) -> Tensor:
    """0; NaN where a value of x is NaN or infinite."""
    return (x * 0).sum()


def at_least_one(count: Count) -> Count:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def at_least_float32(x: Tensor) -> Tensor:
    """Losses are computed in float32 under mixed precision, and in float64 with a float64 model."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
