"""Batch normalisation over all ranks' samples, or over a block's: the same function for any number of ranks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dlops_dist.distributed.collectives import all_sum, of_all_ranks, rank, world_size
from dlops_dist.errors import RunError

GATHERED = 8
"""Ranks whose statistics are gathered, in one exchange that grows with their number; of more they are added up, in two
that do not."""


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
            move_statistics(self, mean, variance * (count / (count - 1).clamp(min=1)))
        return y


class SyncBatchNorm1d(_SyncBatchNorm, nn.BatchNorm1d):
    """Of units: (N, C)."""


class SyncBatchNorm2d(_SyncBatchNorm, nn.BatchNorm2d):
    """Of images: (N, C, H, W)."""


class _BlockBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the samples of one block (Hoffer et al. 2017, Train longer, generalize better: ghost batch norm).

    A pass in training leaves the block's statistics in `block_mean` and `block_var`; the running ones move once a
    step, by those of all blocks, in `move_all` alone.
    """

    block_mean: Tensor
    block_var: Tensor
    passed = False
    """Whether a pass in training has come by, on this rank with samples or without: equal on all."""

    def __init__(self, num_features: int, *arguments: Any, **options: Any) -> None:
        super().__init__(num_features, *arguments, **options)
        for name in ("block_mean", "block_var"):
            self.register_buffer(name, torch.zeros(num_features), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self.passed = True
        if not len(x):  # of which the weights have a gradient all the same, as on other ranks
            return x if self.weight is None else x * _wide_as(self.weight, x) + _wide_as(self.bias, x)
        if x.numel() == x.shape[1]:
            raise RunError(
                f"batch norm sees one value in each of {x.shape[1]} channels, which has no variance; lower --blocks, "
                f"raise --global-batch-size, or leave short batches out by --data.drop-last"
            )
        return F.batch_norm(x, self.block_mean, self.block_var, self.weight, self.bias, True, 1.0, self.eps)


class BlockBatchNorm1d(_BlockBatchNorm, nn.BatchNorm1d):
    """Of units: (N, C)."""


class BlockBatchNorm2d(_BlockBatchNorm, nn.BatchNorm2d):
    """Of images: (N, C, H, W)."""


def is_exact_norm(module: nn.Module) -> bool:
    return isinstance(module, _SyncBatchNorm | _BlockBatchNorm)


def block_norms(model: nn.Module) -> list[_BlockBatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BlockBatchNorm)]


@torch.no_grad()
def move_all(norms: Sequence[tuple[Any, Tensor, Tensor]]) -> None:
    """`move_statistics` of those norms that are in training and in use, by few kernels where they are alike."""
    norms = [given for given in norms if given[0].training and given[0].passed and given[0].track_running_stats]
    momenta = {norm.momentum for norm, _, _ in norms}
    if len(momenta) != 1 or None in momenta:
        for given in norms:
            move_statistics(*given)
        return
    running = [running for norm, _, _ in norms for running in (norm.running_mean, norm.running_var)]
    torch._foreach_add_([norm.num_batches_tracked for norm, _, _ in norms], 1)
    torch._foreach_lerp_(running, [value for given in norms for value in given[1:]], momenta.pop())


@torch.no_grad()
def move_statistics(norm: Any, mean: Tensor, variance: Tensor) -> None:
    """A batch norm's running ones towards those of a batch, by its momentum; without one, to the mean over batches."""
    norm.num_batches_tracked.add_(1)
    for running, value in ((norm.running_mean, mean), (norm.running_var, variance)):
        weight = norm.momentum
        if weight is None:
            weight = norm.num_batches_tracked.double().reciprocal().to(running.dtype)
        running.lerp_(value.to(running.dtype), weight)


def first_local_norm(model: nn.Module) -> str | None:
    """The name of a batch norm that looks at each rank's own samples; None where there is none."""
    return next((name.rpartition(".")[0] for name, _ in _not_synchronised(model)), None)


def first_synchronised_norm(model: nn.Module) -> str | None:
    """The name of a batch norm that looks at the samples of all ranks; None where there is none."""
    return next((name for name, module in model.named_modules() if isinstance(module, _SyncBatchNorm)), None)


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
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not is_exact_norm(module):
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
        if world_size() > GATHERED:
            totals = all_sum(own, _Group.norms) / count
        else:
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

    of each rank's n_r values, their mean m_r and M2_r, the sum of their squared distances from it. Of many ranks
    sum_r n_r m_r / n in float64 instead.
    """
    local_count, channels = x.numel() // x.shape[1], x.shape[1]
    own = x.new_zeros(2 * channels + 1, dtype=torch.promote_types(x.dtype, torch.float32))
    if local_count:
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)  # var_mean takes 35 times as long
        own[:channels], own[channels : 2 * channels], own[-1] = mean, variance * local_count, local_count
    if world_size() > GATHERED:
        wide = own.double()
        totals = all_sum(torch.cat([wide[:channels] * local_count, wide[-1:]]), _Group.norms)
        mean, count = totals[:-1] / totals[-1:].clamp(min=1), totals[-1:]
        m2 = wide[channels:-1] + local_count * (wide[:channels] - mean).square()
        variance = all_sum(m2, _Group.norms) / count.clamp(min=1)
        return mean.to(own.dtype), variance.to(own.dtype), count.to(own.dtype)
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
