"""The device of a worker: which one it is, and what is said when it cannot be used or is full."""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dlops_dist.errors import RunError, UserError

FULL = "out of memory|can't allocate memory|ALLOC_FAILED"
"""What torch's allocators, drivers and libraries say."""


def default_device() -> torch.device:
    """This process's GPU, the one that torchrun's LOCAL_RANK names; the CPU where there is none."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return torch.device("cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        return torch.device("cuda", _local_index(torch.cuda.device_count()))
    for warning in caught:
        _refuse_old_driver(str(warning.message))
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return torch.device("cpu")


def _local_index(num_gpus: int) -> int:
    """Which of the GPUs that are visible here; the only one belongs to whoever sees no other."""
    local_rank = os.environ.get("LOCAL_RANK") or "0"
    if num_gpus == 1:
        return 0
    if not local_rank.isdecimal() or int(local_rank) >= num_gpus:
        raise UserError(f"LOCAL_RANK={local_rank}: {num_gpus} GPUs are visible; start at most a process for each")
    return int(local_rank)


def use(device: torch.device) -> None:
    """Make a GPU this process's own: what names no GPU (pinned memory, objects that ranks exchange) takes the first."""
    if device.type == "cuda" and device.index is not None:
        try:
            torch.cuda.set_device(device)
        except RuntimeError as error:
            _refuse_old_driver(str(error))
            raise


def _refuse_old_driver(said: str) -> None:
    """Refuse a driver of which torch says that it is too old."""
    too_old = re.search(r"driver on your system is too old( \(found version \w+\))?", said)
    if too_old is not None:
        raise UserError(
            f"the NVIDIA driver is too old for torch {torch.__version__}{too_old[1] or ''}; update it, install a torch "
            f"for an older CUDA, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        )


def is_of_memory(error: Exception) -> bool:
    """Whether a device's memory is full."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(re.search(FULL, str(error))))


@contextmanager
def memory_errors_explained(device: torch.device, advice: str) -> Iterator[None]:
    """A device whose memory is full is one line: how much was wanted, and the advice what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        parts = re.split(r"\. |\n", str(error))
        if not is_of_memory(error):
            raise
        wanted = next((part for part in parts if "allocate" in part), parts[0]).rpartition(": ")[2]
        free = next((f" ({part})" for part in parts if part.endswith("is free")), "")
        raise RunError(f"{device} is out of memory: {wanted[:1].lower()}{wanted[1:]}{free}; {advice}") from error
