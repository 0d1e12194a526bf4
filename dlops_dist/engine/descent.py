"""What every learner does with its gradients: add them up over blocks, clip them, step at the scheduled rate."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlops_dist.config import Optimizer, Run
from dlops_dist.distributed.collectives import world_size
from dlops_dist.distributed.norm import give_norms_a_group
from dlops_dist.engine.exactness import planned
from dlops_dist.engine.gradients import Gradients
from dlops_dist.engine.lanes import Lanes
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
        losses: with weights of their own perhaps.
        make: another optimiser of the named weights; the rate of each of its groups is then the peak.
        frozen: parts of the module that stay in evaluation mode.
    """

    def __init__(
        self, module: nn.Module, settings: Run, chosen: Optimizer, epochs: int, steps_per_epoch: int,
        device: torch.device, losses: nn.Module | None = None, make: MakeOptimizer | None = None,
        frozen: Sequence[nn.Module] = (),
    ) -> None:  # fmt: skip
        named = named_weights(module, losses)
        self._module = module
        self._parameters = [*module.parameters(), *(losses.parameters() if losses is not None else ())]
        if make is None:
            self.optimizer: torch.optim.Optimizer = SGD(
                self._parameters, chosen.lr, chosen.momentum, chosen.dampening, chosen.weight_decay, chosen.nesterov
            )
        else:
            self.optimizer = make(named)
        self._update = self.optimizer.update if isinstance(self.optimizer, SGD) else self.optimizer.step
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        self._chosen, self._epochs, self._steps_per_epoch = chosen, epochs, steps_per_epoch
        give_norms_a_group(module)
        if world_size() > 1:  # the seed gives all the same, unless their versions of torch differ
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)
        self.plan = plan = planned(settings, module, device)
        self.lanes = Lanes(module, plan.lanes, settings, device, frozen)
        self.gradients = Gradients(module, [parameter for _, parameter in named], plan.blocks)
        module.eval()  # encoders may be copies of evaluated ones
        self.lanes.set_training()

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

    def step(self, step: int, figures: dict[str, Tensor] | None = None) -> None:
        """Move the weights by their gradients over all blocks, whose norm before clipping is a figure of the step."""
        self.gradients.total()
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
    named = [(name.removeprefix("model."), p) for name, p in module.named_parameters()]
    named += [(f"losses.{name}", p) for name, p in (losses.named_parameters() if losses is not None else ())]
    return [(name, p) for name, p in named if p.requires_grad]
