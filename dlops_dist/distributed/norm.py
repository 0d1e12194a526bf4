"""Batch normalisation over the samples of all ranks: the same function of the global batch for any number of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlops_dist.distributed.collectives import all_sum, world_size


class _SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose statistics are those of all ranks' samples, on any backend, for parts of any size.

    Each rank's (count, mean, M2) are merged in rank order (Chan et al. 1979, eq. 2.1), never E[x^2] - E[x]^2.
    In evaluation, and in a world of one, it is torch's own (but takes a single value in a channel, as several
    ranks do).
    """

    def forward(self, x: Tensor) -> Tensor:
        several = x.numel() > x.shape[1]  # torch's own refuses a single value, which other ranks may add to
        if not self.training or (world_size() == 1 and several):
            return super().forward(x)
        y, mean, variance, count = _SyncNormalize.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
                momentum = self.momentum or 1 / self.num_batches_tracked.item()  # type: ignore[union-attr]
                unbiased = variance * (count / (count - 1).clamp(min=1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)  # type: ignore[union-attr]
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)  # type: ignore[union-attr]
        return y


class SyncBatchNorm1d(_SyncBatchNorm, nn.BatchNorm1d):
    """Of units: (N, C)."""


class SyncBatchNorm2d(_SyncBatchNorm, nn.BatchNorm2d):
    """Of images: (N, C, H, W)."""


@torch.no_grad()
def average_running_statistics(model: nn.Module) -> None:
    """Give every rank the mean over ranks of the running statistics; only norms that are not synchronised need it."""
    for module in model.modules():
        synchronised = isinstance(module, _SyncBatchNorm)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not synchronised and world_size() > 1:
            for statistic in (module.running_mean, module.running_var):
                if statistic is not None:
                    statistic.copy_(all_sum(statistic) / world_size())


@contextmanager
def running_statistics_held(model: nn.Module) -> Iterator[None]:
    """Normalise in training without moving the running statistics: for samples that will pass again."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class _SyncNormalize(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, over all but the channels, of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:  # type: ignore[override]
        wide = x if x.dtype == torch.float64 else x.float()
        mean, variance, count = _global_moments(wide)
        inverse_std = (variance + eps).rsqrt()
        scale = weight * inverse_std
        shift = bias - mean * scale
        ctx.save_for_backward(x, weight, mean, inverse_std, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return _per_channel(wide, scale, shift).to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """dx = scale (dy - mean(dy) - xhat mean(dy xhat)), means over the global batch (Ioffe & Szegedy 2015)."""
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        wide = x if x.dtype == torch.float64 else x.float()
        dy = gradient.to(wide.dtype)
        dims = _all_but_channels(x)
        sum_dy = dy.sum(dims)
        sum_dy_xhat = (dy * (wide - _wide_as(mean, x))).sum(dims) * inverse_std
        totals = all_sum(torch.stack([sum_dy, sum_dy_xhat])) / count
        scale = weight * inverse_std
        slope = -scale * totals[1] * inverse_std
        offset = -scale * totals[0] - slope * mean
        dx = torch.addcmul(_per_channel(wide, slope, offset), dy, _wide_as(scale, x))
        return dx.to(x.dtype), sum_dy_xhat, sum_dy, None


def _global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance (C,) of x (N, C, ...) over all ranks, and the number of values in each channel."""
    local_count = x.numel() // x.shape[1]
    channels = x.shape[1]
    own = x.new_zeros(2 * channels + 1)
    if local_count:
        variance, mean = torch.var_mean(x, _all_but_channels(x), correction=0)
        own[:channels], own[channels : 2 * channels], own[-1] = mean, variance * local_count, local_count
    parts = [own]
    if world_size() > 1:
        parts = [torch.empty_like(own) for _ in range(world_size())]
        dist.all_gather(parts, own)
    mean, m2, count = (own.new_zeros(n) for n in (channels, channels, 1))
    for part in parts:
        part_mean, part_m2, part_count = part[:channels], part[channels:-1], part[-1:]
        total = (count + part_count).clamp(min=1)
        delta = part_mean - mean
        mean = mean + delta * (part_count / total)
        m2 = m2 + part_m2 + delta.square() * (count * part_count / total)
        count = count + part_count
    return mean, m2 / count.clamp(min=1), count


def _per_channel(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(_wide_as(shift, x), x, _wide_as(scale, x))


def _all_but_channels(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))


def _wide_as(by_channel: Tensor, x: Tensor) -> Tensor:
    """(C,) to what stands against x (N, C, ...)."""
    return by_channel.view(-1, *[1] * (x.ndim - 2))
