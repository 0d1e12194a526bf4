"""Figures of every so many steps, which a device computes beside the step and nobody waits for."""

import math
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Figures = dict[str, Tensor]
"""{name: scalar on the device}"""


class StepLog:
    """What is logged of a run's steps, on the rank that logs.

    Args:
        every: steps from one that is logged to the next; 0 for none.
    """

    def __init__(self, every: int, global_batch_size: int, device: torch.device) -> None:
        self._every, self._global_batch_size, self._device = every, global_batch_size, device
        self._waiting: list[tuple[dict[str, Any], Figures]] = []
        self._since, self._steps = time.monotonic(), 0

    def begin(self) -> None:
        """Steps are counted, and timed, from here on."""
        self._since, self._steps = time.monotonic(), 0

    def place(self, step: int) -> Figures | None:
        """Where a step's figures are to go; None where it is not logged."""
        self._steps += 1
        return {} if self._every and step % self._every == 0 else None

    def add(self, row: dict[str, Any], figures: Figures) -> None:
        """A step's row, its figures still on the device."""
        now = time.monotonic()
        rate = self._steps * self._global_batch_size / max(now - self._since, 1e-9)
        self._waiting.append((row | {"memory_gb": memory(self._device) / 1e9, "images_per_s": rate}, figures))
        self._since, self._steps = now, 0

    def fetch(self, loss: Tensor) -> tuple[float, list[dict[str, Any]]]:
        """The value of a loss, and by the same wait the rows of which figures were still on the device."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return loss.item(), []
        values = [loss, *(value for _, figures in waiting for value in figures.values())]
        value, *fetched = torch.stack([v.double().to(self._device) for v in values]).tolist()
        found = iter(fetched)
        return value, [row | {name: _finite(next(found)) for name in figures} for row, figures in waiting]


def _finite(value: float) -> float | None:
    """JSON knows no other numbers."""
    return value if math.isfinite(value) else None


def memory(device: torch.device) -> int:
    """Bytes that tensors have filled at most, on a GPU; that this process has in memory, on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    pages = Path("/proc/self/statm")
    if pages.is_file():
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # at most, where there is no such file: in bytes
