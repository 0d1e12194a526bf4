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

Named = Sequence[tuple[str, nn.Parameter]]
"""Weights by their names: those of the model as they are in it, those of losses after `losses.NAME.`."""
MakeOptimizer = Callable[[Named], torch.optim.Optimizer]


class Descent:
    """A module under an optimiser, on this rank.

    Args:
        module: what is trained.
        chosen: settings of SGD, and the learning rate over time.
        epochs: of the stage that trains it.
        losses: with weights of their own perhaps: every rank has the gradient of its own share.
        make: another optimiser of the named weights; the rate of each of its groups is then the peak.
        frozen: parts of the module that stay in evaluation mode.
    """

    def __init__(
        self, module: nn.Module, settings: Run, chosen: Optimizer, epochs: int, steps_per_epoch: int,
        device: torch.device, losses: nn.Module | None = None, make: MakeOptimizer | None = None,
        frozen: Sequence[nn.Module] = (),
    ) -> None:  # fmt: skip
        self._module, self._frozen = module, frozen
        self._others = list(losses.parameters()) if losses is not None else []
        self._parameters = [*module.parameters(), *self._others]
        if make is None:
            self.optimizer: torch.optim.Optimizer = SGD(
                self._parameters, chosen.lr, chosen.momentum, chosen.dampening, chosen.weight_decay, chosen.nesterov
            )
        else:
            self.optimizer = make(named_weights(module, losses))
        self._update = self.optimizer.update if isinstance(self.optimizer, SGD) else self.optimizer.step
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
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
        self._module.eval()  # encoders may be copies of evaluated ones
        self.set_training()

    def lr(self, step: int, group: int = 0) -> float:
        """Learning rate of a step, counted from 0 over all epochs of the stage; of the optimiser's first group."""
        chosen, per_epoch = self._chosen, self._steps_per_epoch
        total = self._epochs * per_epoch
        warmup = min(round(chosen.warmup_epochs * per_epoch), total // 2)
        decay = chosen.step_epochs * per_epoch
        return self._peaks[group] * lr_factor(step, total, chosen.schedule, warmup, decay, chosen.step_gamma)

    def trained(self) -> dict[str, Tensor]:
        """The weights of the module."""
        return {name.removeprefix("model."): p for name, p in self._module.named_parameters()}

    def set_training(self) -> None:
        """All but what is frozen. Going through all modules takes longer than a step of a small network: once."""
        if not self._module.training:
            self.distributed.train()
            for part in self._frozen:
                part.eval()

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
        for number, group in enumerate(self.optimizer.param_groups):
            group["lr"] = self.lr(step, number)
        self._update()


def named_weights(module: nn.Module, losses: nn.Module | None) -> list[tuple[str, nn.Parameter]]:
    """What is trained of a model and of its losses."""
    named = [(name.removeprefix("model."), p) for name, p in module.named_parameters() if p.requires_grad]
    return named + [(f"losses.{name}", p) for name, p in (losses.named_parameters() if losses is not None else ())]
