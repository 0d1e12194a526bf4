"""How a step is cut into blocks, and whether it then gives the same bits on any number of workers."""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from dlops_dist.config import Run
from dlops_dist.distributed.collectives import world_size
from dlops_dist.distributed.norm import block_norms, first_local_norm, first_synchronised_norm
from dlops_dist.distributed.tree import Blocks
from dlops_dist.engine.numerics import compiles
from dlops_dist.errors import UserError

MOST_BLOCKS = 8
LEAST_SAMPLES = 32
"""Of a block, where their number is not given. Of a smaller batch that is one block, by all threads of its worker."""


class Plan(NamedTuple):
    """Of the steps of one network on this rank."""

    blocks: Blocks
    lanes: int
    """Blocks that are computed at once."""
    rounding: str | None = None
    """Why other workers agree up to rounding alone, or not at all; None where they give the same bits."""

    @property
    def promise(self) -> str:
        if self.rounding is not None:
            return f"not to the bit: {self.rounding}"
        number = self.blocks.number
        return f"bits: the same on up to {number} worker{'s' * (number > 1)}"


def default_blocks(batch_size: int) -> int:
    """The largest power of two, up to 8, that leaves at least 32 samples to a block; else 1."""
    number = MOST_BLOCKS
    while number > 1 and batch_size < number * LEAST_SAMPLES:
        number //= 2
    return number


def planned(settings: Run, network: nn.Module, device: torch.device) -> Plan:
    """How the steps of a network are computed; on the device "meta", how they would be.

    Raises:
        UserError: there are more workers than blocks, or bits are asked for that cannot be had.
    """
    size, workers = settings.global_batch_size, workers_of(settings) if device.type == "meta" else world_size()
    number = settings.blocks or default_blocks(size)
    if number > size:
        raise UserError(f"blocks: {number} are more than the {size} samples of a batch")
    why = next(_why_rounding(settings, network), None)
    if why is None and number == workers == 1 and settings.exactness is None and settings.blocks is None:
        why = f"a batch of {size} makes one block of {LEAST_SAMPLES} samples, by all threads; --blocks 2 makes two"
    if why is not None:
        if settings.exactness == "bits":
            raise UserError(f"exactness: bits cannot be had: {why}")
        return Plan(Blocks(max(number, workers) if block_norms(network) else workers), 1, why)
    if workers > number:
        raise UserError(
            f"workers: {workers} are more than the {number} block{'s' * (number > 1)} of a batch of {size}; start at "
            f"most {number}, or pass --blocks {workers}, with other bits, or --exactness rounding"
        )
    blocks = Blocks(number)
    several = device.type == "cpu" and not compiles(settings, device)
    threads = threads_at_start() // settings.threads_per_block if several else 1
    return Plan(blocks, max(1, min(threads, len(blocks.own))))


def workers_of(settings: Run) -> int:
    """Those that a run has, or is to have, as far as its settings say."""
    return max(world_size(), 1 if settings.local else settings.workers or 1)


def use_threads(settings: Run, plan: Plan, device: torch.device) -> None:
    """Let what is computed for all blocks be computed as each of them is: the bits of a sum change with its threads."""
    if plan.rounding is None and device.type == "cpu":
        torch.set_num_threads(settings.threads_per_block)


def _why_rounding(settings: Run, network: nn.Module) -> Iterator[str]:
    """What keeps workers from giving the same bits."""
    local, synchronised = (
        (first(network) or "").removeprefix("model.") for first in (first_local_norm, first_synchronised_norm)
    )
    if local:
        yield f"{local} is a batch norm over each worker's own samples: results depend on --workers"
    if settings.exactness == "rounding":
        yield "other workers may differ by it, as --exactness says"
    if not settings.deterministic:
        yield "--no-deterministic takes any kernel"
    if synchronised:
        yield f"{synchronised} is a batch norm over all workers' samples; one over blocks gives the same bits"


@cache
def threads_at_start() -> int:
    """Those of torch in this process, before a run takes them for its lanes."""
    return torch.get_num_threads()
