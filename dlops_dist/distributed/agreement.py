"""Whether all ranks hold the same bits: what training promises, and what faulty memory or a stray change breaks."""

import socket
from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from dlops_dist.distributed.collectives import of_all_ranks, world_size

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
AT_ONCE = 2**20
"""Values whose products are held at once."""
ODD = 0x9E3779B97F4A7C15 - 2**64


@torch.no_grad()
def bits_hash(x: Tensor) -> Tensor:
    """A 64-bit hash of the values of x and their places, int64 (): sum of bits times odd numbers, in any order."""
    bits = x.contiguous().view(BITS[x.element_size()]).flatten()
    total = bits.new_zeros((), dtype=torch.int64)
    for start in range(0, len(bits), AT_ONCE):
        part = bits[start : start + AT_ONCE].long()
        total += (part * (torch.arange(start, start + len(part), device=x.device) * ODD | 1)).sum()
    return total


def describe_divergence(tensors: Mapping[str, Tensor]) -> str | None:
    """Which ranks hold other bits than most ranks do, where, and on which hosts; None where all are equal.

    The same answer on every rank; all must call it. One small gather; of two ranks, the first is believed.
    """
    if world_size() == 1:
        return None
    hashes = of_all_ranks(torch.stack([bits_hash(x) for x in tensors.values()]))
    by_rank = [tuple(row) for row in hashes.tolist()]
    usual, _ = Counter(by_rank).most_common(1)[0]
    odd = [rank for rank, row in enumerate(by_rank) if row != usual]
    if not odd:
        return None
    hosts = [""] * world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    where = next(name for name, own, other in zip(tensors, by_rank[odd[0]], usual, strict=True) if own != other)
    ranks = ", ".join(f"{rank} (on {hosts[rank]})" for rank in odd)
    return f"rank {ranks} differs from the other ranks, first in {where}"
