"""What every learner does with its gradients: average them over ranks, clip them, step at the scheduled rate."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dlops_dist.config import Optimizer, Run
from dlops_dist.distributed.collectives import all_sum, world_size
from dlops_dist.distributed.norm import give_norms_a_group
from dlops_dist.engine.numerics import compiled
from dlops_dist.errors import RunError
from dlops_dist.optim import SGD, lr_factor


class Descent:
    """A module under SGD, on this rank.

    Args:
        module: what is trained.
        others: parameters beside it, the weights of losses: every rank has the gradient of its own share.
        chosen: its optimiser, and the learning rate over time.
        epochs: of the stage that trains it.
    """

    def __init__(
        self, module: nn.Module, settings: Run, chosen: Optimizer, epochs: int, steps_per_epoch: int,
        device: torch.device, others: Sequence[nn.Parameter] = (),
    ) -> None:  # fmt: skip
        self._module, self._others = module, others
        self._parameters = [*module.parameters(), *others]
        self.optimizer = SGD(
            self._parameters, chosen.lr, chosen.momentum, chosen.dampening, chosen.weight_decay, chosen.nesterov
        )
        self._chosen, self._epochs, self._steps_per_epoch = chosen, epochs, steps_per_epoch
        give_norms_a_group(module)
        module = compiled(module, settings, device)
        self.undistributed = module
        """The module, perhaps compiled; its gradients stay on this rank."""
        if world_size() > 1:
            module = DistributedDataParallel(module, gradient_as_bucket_view=True)
            module.broadcast_buffers = False  # after the first time: each rank's own statistics stay its own
        self.distributed = module
        """The module whose backward pass averages gradients over ranks."""
        self._settled = world_size() == 1

    def lr(self, step: int) -> float:
        """Learning rate of a step, counted from 0 over all epochs of the stage."""
        chosen, per_epoch = self._chosen, self._steps_per_epoch
        total = self._epochs * per_epoch
        warmup = min(round(chosen.warmup_epochs * per_epoch), total // 2)
        decay = chosen.step_epochs * per_epoch
        return chosen.lr * lr_factor(step, total, chosen.schedule, warmup, decay, chosen.step_gamma)

    def settle(self, forward: Callable[[], Iterable[Tensor]]) -> None:
        """Before the first step after a start: let DDP choose its buckets, by a pass that trains nothing.

        It rebuilds them in the order of the first backward pass, and sums over three or more ranks are rounded by
        where a gradient lies in them. Now every step finds the same buckets, that after a resume too.

        Args:
            forward: through `distributed`, in training; all of its parameters must take part.
        """
        if self._settled:
            return
        before = [buffer.clone() for buffer in self.distributed.buffers()]
        sum(output.sum() for output in forward()).backward()  # type: ignore[union-attr]
        unused = [name for name, p in self._module.named_parameters() if p.requires_grad and p.grad is None]
        if unused:
            raise RunError(f"the weights {unused[0]} get no gradient: they are not used; leave them out of the model")
        self.forget_gradients()
        for buffer, value in zip(self.distributed.buffers(), before, strict=True):
            buffer.copy_(value)
        self._settled = True

    def exchanged(self, now: bool) -> AbstractContextManager[None]:
        """DDP averages the gradients that all micro-batches have added up, with the last of them."""
        if now or not isinstance(self.distributed, DistributedDataParallel):
            return nullcontext()
        return self.distributed.no_sync()  # type: ignore[no-any-return]

    def forget_gradients(self) -> None:
        for parameter in self._parameters:  # the optimizer's own zero_grad takes five times as long
            parameter.grad = None

    def step(self, step: int, figures: dict[str, Tensor] | None = None) -> None:
        """Move the parameters by their gradients, whose norm before clipping is a figure of the step."""
        for parameter in self._others:
            if parameter.grad is not None:
                parameter.grad = all_sum(parameter.grad) / world_size()
        if self._chosen.clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(self._parameters, self._chosen.clip_norm)
        elif figures is not None:
            norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if figures is not None:
            figures["gradient_norm"] = norm
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step)
        self.optimizer.update()
