"""Stochastic gradient descent, and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

Schedule = Literal["cosine", "one-cycle", "step", "constant"]
ONE_CYCLE_START, ONE_CYCLE_END = 1 / 25, 1e-4


class SGD(torch.optim.Optimizer):
    """SGD with momentum m, dampening t, weight decay w (Sutskever et al. 2013, with torch's momentum).

        g <- g + w p;    b <- m b + (1 - t) g  (b = g at first);    p <- p - lr (g + m b if nesterov else b)

    Works on all parameters of a device and type at once. The same bits as torch.optim.SGD(foreach=True), and
    each loads the other's state dict.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if not value >= 0:  # NaN too
                raise ValueError(f"{name} must be at least 0, not {value}")
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError("nesterov needs momentum > 0 and dampening 0")
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening,
            "weight_decay": weight_decay, "nesterov": nesterov, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move every parameter that has a gradient. Returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in params):
                raise ValueError("SGD takes dense gradients only; build the embedding with sparse=False")
            for same_kind in _by_device_and_dtype(params):
                self._update(same_kind, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        gradients: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
        owned = False  # whether the gradients are our copies, which may be overwritten
        if group["maximize"]:
            gradients, owned = list(torch._foreach_neg(gradients)), True
        if group["weight_decay"]:
            if owned:
                torch._foreach_add_(gradients, params, alpha=group["weight_decay"])
            else:
                gradients, owned = list(torch._foreach_add(gradients, params, alpha=group["weight_decay"])), True
        if group["momentum"]:
            buffers = self._momentum(params, gradients, group)
            if group["nesterov"]:
                if owned:
                    torch._foreach_add_(gradients, buffers, alpha=group["momentum"])
                else:
                    gradients = list(torch._foreach_add(gradients, buffers, alpha=group["momentum"]))
            else:
                gradients = buffers
        torch._foreach_add_(params, gradients, alpha=-group["lr"])

    def _momentum(self, params: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """The momentum buffers, advanced; a new one starts as a copy of its gradient."""
        buffers: list[Tensor] = []
        advanced: list[Tensor] = []
        by: list[Tensor] = []
        for param, gradient in zip(params, gradients, strict=True):
            buffer = self.state[param].get("momentum_buffer")
            if buffer is None:
                buffer = self.state[param]["momentum_buffer"] = gradient.detach().clone()
            else:
                advanced.append(buffer)
                by.append(gradient)
            buffers.append(buffer)
        if advanced:
            torch._foreach_mul_(advanced, group["momentum"])
            torch._foreach_add_(advanced, by, alpha=1 - group["dampening"])
        return buffers


def _by_device_and_dtype(params: list[Tensor]) -> Iterable[list[Tensor]]:
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param in params:
        kinds.setdefault((param.device, param.dtype), []).append(param)
    return kinds.values()


def lr_factor(
    step: int,
    total_steps: int,
    schedule: Schedule = "cosine",
    warmup_steps: int = 0,
    steps_per_decay: int = 1,
    gamma: float = 0.1,
) -> float:
    """Learning rate of a step (from 0), as a part of the peak.

    warm-up:   (step + 1) / warmup_steps while step < warmup_steps, else by u = progress after it, in [0, 1):
    cosine:    (1 + cos(pi u)) / 2                                   (Loshchilov & Hutter 2017, eq. 5)
    one-cycle: cosine up from 1/25 in the warm-up, then cosine down to 1e-4    (after Smith & Topin 2018)
    step:      gamma ** floor(step / steps_per_decay)
    constant:  1
    """
    if step < warmup_steps:
        rising = (step + 1) / warmup_steps
        return _cosine(1.0, ONE_CYCLE_START, rising) if schedule == "one-cycle" else rising
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    match schedule:
        case "cosine":
            return _cosine(0.0, 1.0, progress)
        case "one-cycle":
            return _cosine(ONE_CYCLE_END, 1.0, progress)
        case "step":
            return gamma ** (step // steps_per_decay)
        case "constant":
            return 1.0
        case _:
            raise ValueError(f"schedule must be 'cosine', 'one-cycle', 'step' or 'constant', not {schedule!r}")


def _cosine(low: float, high: float, progress: float) -> float:
    """From high at progress 0 to low at progress 1."""
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2
