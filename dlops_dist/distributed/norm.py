"""Batch normalisation over the samples of all ranks: the same function of the global batch for any number of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlops_dist.distributed.collectives import of_all_ranks, rank, world_size
from dlops_dist.errors import RunError


class _Group:
    """The process group of all norms: all ranks, but a communicator of its own."""

    norms: Any = None
    world: Any = None


def give_norms_a_group(model: nn.Module) -> None:
    """Let the small gathers of norms pass by the large sums of DDP, behind which they would wait. All must call it."""
    synchronised = any(isinstance(module, _SyncBatchNorm) for module in model.modules())
    if synchronised and world_size() > 1 and _Group.world is not dist.group.WORLD:
        world: Any = dist.group.WORLD
        timeout = world._get_backend(world._device_types[0]).options._timeout  # torch's own default is half an hour
        _Group.norms, _Group.world = dist.new_group(timeout=timeout), world


class _SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose statistics are those of all ranks' samples, on any backend, for parts of any size.

    Each rank's (count, mean, M2) are merged (after Chan et al. 1979, eq. 2.1), never E[x^2] - E[x]^2.
    In evaluation, and in a world of one, it is torch's own.

    Raises:
        RunError: there is a single value in each channel, in training; a GPU looks for it in a world of one only.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or (world_size() == 1 and x.numel() > x.shape[1]):
            return super().forward(x)
        y, mean, variance, count = _SyncNormalize.apply(x, self.weight, self.bias, self.eps)
        if world_size() == 1 or (count.is_cpu and not torch.compiler.is_compiling() and count == 1):
            raise RunError(
                f"batch norm sees one value in each of {x.shape[1]} channels, which has no variance; raise "
                f"--micro-batch-size or --global-batch-size, or leave short batches out by --data.drop-last"
            )
        if self.track_running_stats:
            self._move_statistics(mean, variance * (count / (count - 1).clamp(min=1)))
        return y

    @torch.no_grad()
    def _move_statistics(self, mean: Tensor, variance: Tensor) -> None:
        """Towards those of a batch, by the momentum; without one, to the mean over all batches."""
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        for running, value in ((self.running_mean, mean), (self.running_var, variance)):
            weight: Any = self.momentum
            if weight is None:
                weight = self.num_batches_tracked.double().reciprocal().to(running.dtype)  # type: ignore[union-attr]
            running.lerp_(value.to(running.dtype), weight)  # type: ignore[union-attr]


class SyncBatchNorm1d(_SyncBatchNorm, nn.BatchNorm1d):
    """Of units: (N, C)."""


class SyncBatchNorm2d(_SyncBatchNorm, nn.BatchNorm2d):
    """Of images: (N, C, H, W)."""


def first_local_norm(model: nn.Module) -> str | None:
    """The name of a batch norm that looks at each rank's own samples; None where there is none."""
    return next((name.rpartition(".")[0] for name, _ in _not_synchronised(model)), None)


@torch.no_grad()
def average_running_statistics(model: nn.Module) -> None:
    """Give every rank the mean over ranks of the running statistics; only norms that are not synchronised need it."""
    for name, of_each_rank in local_statistics(model).items():
        model.get_buffer(name).copy_(_mean(of_each_rank))


@torch.no_grad()
def local_statistics(model: nn.Module) -> dict[str, Tensor]:
    """{name of a buffer: (W, C) of all ranks} of the running statistics in which ranks differ. All must call it."""
    if world_size() == 1:
        return {}
    return {name: of_all_ranks(buffer) for name, buffer in _not_synchronised(model)}


def load_local_statistics(model: nn.Module, of_each_rank: dict[str, Tensor]) -> None:
    """Give each rank its own again, from `local_statistics`; where the number of ranks changed, all the mean."""
    for name, values in of_each_rank.items():
        model.get_buffer(name).copy_(values[rank()] if len(values) == world_size() else _mean(values))


def with_mean_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model, equal on all ranks: running statistics that are not are averaged. All must call it."""
    return model.state_dict() | {name: _mean(values) for name, values in local_statistics(model).items()}


def _not_synchronised(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, _SyncBatchNorm):
            for name in ("running_mean", "running_var"):
                if getattr(module, name) is not None:
                    yield f"{path}.{name}", getattr(module, name)


def _mean(of_each_rank: Tensor) -> Tensor:
    """Over ranks; of equal values that value, to the bit."""
    return of_each_rank[0] + (of_each_rank - of_each_rank[0]).mean(dim=0)


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
        mean, variance, count = _global_moments(_reducible(x))
        scale = weight * (variance + eps).rsqrt()
        shift = bias - mean * scale
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, count)
        y = _per_channel(x, scale, shift)
        if y.dtype != x.dtype:  # a cast to the same type, compiled by torch 2.11, makes all gradients 0
            y = y.to(x.dtype)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """dx = scale (dy - mean(dy) - xhat mean(dy xhat)), means over the global batch (Ioffe & Szegedy 2015).

        This rank's sums of dy xhat and dy are the gradients of a norm that takes mean and variance as given.
        """
        x, weight, mean, variance, count = ctx.saved_tensors
        inverse_std = (variance + ctx.eps).rsqrt()
        sum_dy_xhat, sum_dy = torch.zeros_like(mean), torch.zeros_like(mean)
        if len(x):  # CPUs take mean and variance, GPUs mean and 1 / std
            _, sum_dy_xhat, sum_dy = torch.ops.aten.native_batch_norm_backward(
                _reducible(gradient), _reducible(x), weight, mean, variance, mean, inverse_std, False, ctx.eps,
                [False, True, True],
            )  # fmt: skip
        own = torch.stack([sum_dy, sum_dy_xhat])
        totals = of_all_ranks(own, _Group.norms).sum(dim=0) / count  # sooner there than a reduction
        scale = weight * inverse_std
        slope = -scale * totals[1] * inverse_std
        offset = -scale * totals[0] - slope * mean
        dx = _per_channel(x, slope, offset).addcmul_(gradient, _wide_as(scale, x))
        return dx.to(x.dtype), sum_dy_xhat, sum_dy, None


def _reducible(x: Tensor) -> Tensor:
    """What a kernel adds up in float32 at least: a GPU's does so from narrower values, without a copy of them."""
    return x if x.is_cuda or x.dtype == torch.float64 else x.float()


def _global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance (C,) of x (N, C, ...) over all ranks, and the number of values in each channel.

        mean = m_0 + sum_r n_r (m_r - m_0) / n,    n variance = sum_r M2_r + n_r (m_r - mean)^2

    of each rank's n_r values, their mean m_r and M2_r, the sum of their squared distances from it.
    """
    local_count, channels = x.numel() // x.shape[1], x.shape[1]
    own = x.new_zeros(2 * channels + 1, dtype=torch.promote_types(x.dtype, torch.float32))
    if local_count:
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)  # var_mean takes 35 times as long
        own[:channels], own[channels : 2 * channels], own[-1] = mean, variance * local_count, local_count
    means, m2s, counts = of_all_ranks(own, _Group.norms).split([channels, channels, 1], dim=1)
    count = counts.sum(dim=0)
    shares = counts / count.clamp(min=1)
    mean = means[0] + (shares * (means - means[0])).sum(dim=0)
    variance = (m2s / count.clamp(min=1) + shares * (means - mean).square()).sum(dim=0)
    return mean, variance, count


def _per_channel(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x scale + shift, at least float32."""
    return torch.addcmul(_wide_as(shift, x), x, _wide_as(scale, x))


def _wide_as(by_channel: Tensor, x: Tensor) -> Tensor:
    """(C,) to what stands against x (N, C, ...)."""
    return by_channel.view(-1, *[1] * (x.ndim - 2))
