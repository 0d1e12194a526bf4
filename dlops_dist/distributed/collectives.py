"""What ranks exchange: global sums, and a gather through which gradients flow back.

Without a process group every function is that of a world of one.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
SENT_AT_ONCE = 2**26
"""Bytes of a long content."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of x over all ranks, the same bits on each; without gradient.

    Args:
        group: another one of all ranks than the default.
    """
    total = x.detach().clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        dist.all_reduce(total, group=group)
    return total


def of_first_rank(result: Callable[[], T]) -> T:
    """What a function gives on rank 0, on every rank: whatever can be pickled. So is what it raises."""
    if world_size() == 1:
        return result()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = result()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]  # type: ignore[no-any-return]


def bytes_of_first_rank(result: Callable[[], bytes | None], device: torch.device) -> bytes | None:
    """What a function gives on rank 0, on every rank; sent by way of a device, a part at a time."""
    content: bytes | None = None

    def read() -> int | None:
        nonlocal content
        content = result()
        return None if content is None else len(content)

    size = of_first_rank(read)
    if world_size() == 1 or not size:
        return None if size is None else content or b""
    whole = torch.frombuffer(bytearray(content or size), dtype=torch.uint8)
    for part in whole.split(SENT_AT_ONCE):
        sent = part.to(device)
        dist.broadcast(sent, 0)
        part.copy_(sent)
    return whole.numpy().tobytes()


def of_all_ranks(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """x of each rank, (W, ...), in rank order; the same shape on each, without gradient.

    Args:
        group: another one of all ranks than the default.
    """
    own = x.detach().contiguous()
    if world_size() == 1:
        return own[None]
    every = own.new_empty(world_size() * own.numel())
    dist.all_gather_into_tensor(every, own.view(-1), group)  # gloo takes half the time of one into a list
    return every.view(world_size(), *own.shape)


def gather(x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """The rows of all ranks, (sum of sizes, ...), in rank order, from each rank's x (sizes[rank], ...).

        backward:  grad x_r = sum over ranks q of (grad of q's result)[rows of r]

    so a loss that rank q computes from r's rows reaches r's parameters. Parts may be unequal or empty; where
    `sizes` is not given, it is exchanged first.
    """
    if world_size() == 1:
        return x
    if sizes is None:
        sizes = _exchange_sizes(x)
    return _Gather.apply(x, tuple(sizes))


def _exchange_sizes(x: Tensor) -> list[int]:
    return of_all_ranks(torch.tensor(len(x), device=x.device)).tolist()  # type: ignore[no-any-return]


class _Gather(torch.autograd.Function):
    """Parts are padded to the largest: gloo aborts the process on uneven ones."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, sizes: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        ctx.sizes = sizes  # type: ignore[attr-defined]
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        return torch.cat([part[:size] for part, size in zip(of_all_ranks(padded), sizes, strict=True)])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        start = sum(ctx.sizes[: rank()])  # type: ignore[attr-defined]
        return all_sum(gradient)[start : start + ctx.sizes[rank()]], None  # type: ignore[attr-defined]
