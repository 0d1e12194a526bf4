"""How a device computes: number types, memory formats, compiled kernels, the same bits each time or not."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import nn

from dlops_dist.config import Run

Computed = TypeVar("Computed", bound=Callable[..., Any])
CHANNELS_IN_A_BLOCK = 16
"""Of oneDNN's convolutions on CPUs with AVX-512 (with AVX2: 8)."""

SHAPES = 256
"""Graphs of one function; beyond, torch runs it uncompiled. The layers of a stack share one, of a shape for each."""


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


def memory_format_of(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Channels-last, unless the model has a convolution that a CPU cannot compute so.

    Of a strided 1x1 convolution with fewer input channels than a block holds, oneDNN writes the weights' gradient past
    the end of its memory: the process crashes, or the gradient is wrong (uxlfoundation/oneDNN, issue 6035).
    """
    if device.type == "cpu" and any(_overruns(module) for module in model.modules()):
        return torch.contiguous_format
    return torch.channels_last


def _overruns(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d):
        return False
    strided = module.kernel_size == (1, 1) and module.stride != (1, 1)
    return strided and module.in_channels // module.groups < CHANNELS_IN_A_BLOCK


def compiles(settings: Run, device: torch.device) -> bool:
    """Whether a run compiles its kernels: by default on GPUs, but not for a trial of seconds."""
    return settings.compile if settings.compile is not None else device.type == "cuda" and not settings.smoke


def compiled(function: Computed, settings: Run, device: torch.device) -> Computed:
    """A function or module with its kernels fused, where the run wants that; each shape is compiled on its own."""
    if not compiles(settings, device):
        return function
    torch._dynamo.config.recompile_limit = SHAPES  # type: ignore[attr-defined]
    return cast(Computed, torch.compile(function, dynamic=False))


def set_numerics(settings: Run, device: torch.device) -> None:
    """The same bits each time where that is asked for; on a GPU, float32 means float32."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # these names, as torch's compiler reads them
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.benchmark = not settings.deterministic
    if compiles(settings, device):
        torch.use_deterministic_algorithms(settings.deterministic)  # tells the compiler too, for which it imports it
    else:
        torch.set_deterministic_debug_mode("error" if settings.deterministic else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a kernel each time
