"""How exactly a device computes: number types, and whether it gives the same bits each time."""

from typing import NamedTuple

import torch

from dlops_dist.config import Run


class Precision(NamedTuple):
    """Of what a learner holds, and of what passes through its network."""

    dtype: torch.dtype
    autocast: bool
    """Whether the network computes in bf16."""


def precision_of(settings: Run, device: torch.device) -> Precision:
    autocast = settings.precision == "bf16"
    if settings.precision == "auto" and device.type == "cuda":
        autocast = torch.cuda.is_bf16_supported(including_emulation=False)
    return Precision(torch.float64 if settings.precision == "float64" else torch.float32, autocast)


def set_numerics(settings: Run, device: torch.device) -> None:
    """On a GPU: float32 means float32, and the same bits each time where that is asked for."""
    if device.type != "cuda":
        return
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not settings.deterministic
    torch.use_deterministic_algorithms(settings.deterministic)
