"""Stochastic gradient descent, and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable, Iterable, Sequence
from inspect import unwrap
from typing import Any, Literal

import torch
from torch import Tensor

Schedule = Literal["cosine", "one-cycle", "step", "constant"]
PIECE = 2**20
"""Values of a large tensor that are updated together: those of weight, gradient and momentum fit into 12 MB."""
ONE_CYCLE_START, ONE_CYCLE_END = 1 / 25, 1e-4


class SGD(torch.optim.Optimizer):
    """SGD with momentum m, dampening t, weight decay w (Sutskever et al. 2013, with torch's momentum).

        g <- g + w p;    b <- m b + (1 - t) g  (b = g at first);    p <- p - lr (g + m b if nesterov else b)

    Works on all parameters of a device and type at once. The same bits as torch.optim.SGD(foreach=True), and
    each loads the other's state dict.
    """

    # torch wraps these so that torch.compile leaves them alone, and imports all of it to do so: seconds in each process
    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)

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

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move every parameter that has a gradient. Returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    @torch.no_grad()
    def update(self) -> None:
        """What `step` does between torch's hooks, which take longer than the update of a small layer."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in params):
                raise ValueError("SGD takes dense gradients only; build the embedding with sparse=False")
            for same_kind in _by_device_and_dtype(params):
                self._update_alike(same_kind, group)

    def _update_alike(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Move parameters of one device and type. A new momentum buffer starts as a copy of its gradient."""
        if not group["momentum"]:
            for some, gradients in _pieces(params, _gradients_of(params)):
                _move(some, gradients, [], group)
            return
        known: list[tuple[Tensor, Tensor]] = []
        new: list[tuple[Tensor, Tensor]] = []
        for param in params:
            state = self.state[param]
            if (momentum := state.get("momentum_buffer")) is not None:
                known.append((param, momentum))
            else:
                state["momentum_buffer"] = torch.empty_like(param)
                new.append((param, state["momentum_buffer"]))
        for pairs in filter(None, (new, known)):
            chosen, momenta = map(list, zip(*pairs, strict=True))
            for some, gradients, buffers in _pieces(chosen, _gradients_of(chosen), momenta):
                _move(some, gradients, buffers, group, first=pairs is new)


def _move(
    params: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], group: dict[str, Any], first: bool = False
) -> None:
    """One step; `first` where the buffers are still empty."""
    owned = False  # whether the gradients are our copies, which may be overwritten
    if group["maximize"]:
        gradients, owned = list(torch._foreach_neg(gradients)), True
    if group["weight_decay"]:
        if owned:
            torch._foreach_add_(gradients, params, alpha=group["weight_decay"])
        else:
            gradients, owned = list(torch._foreach_add(gradients, params, alpha=group["weight_decay"])), True
    if group["momentum"]:
        if first:
            torch._foreach_copy_(buffers, gradients)
        else:
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, gradients, alpha=1 - group["dampening"])
        if not group["nesterov"]:
            gradients = buffers
        elif owned:
            torch._foreach_add_(gradients, buffers, alpha=group["momentum"])
        else:
            gradients = list(torch._foreach_add(gradients, buffers, alpha=group["momentum"]))
    torch._foreach_add_(params, gradients, alpha=-group["lr"])


def _gradients_of(params: list[Tensor]) -> list[Tensor]:
    return [param.grad for param in params]  # type: ignore[misc]


def _pieces(*lists: list[Tensor]) -> Iterable[list[list[Tensor]]]:
    """Lists of tensors that belong together: all small ones at once, then each large one of a CPU in flat pieces.

    What is done to a piece finds it in the cache: a tenth to a third less time for ResNet-18.
    """
    if all(tensor.numel() <= PIECE for tensor in lists[0]):
        yield list(lists)
        return
    whole: list[tuple[Tensor, ...]] = []
    large: list[tuple[Tensor, ...]] = []
    for own in zip(*lists, strict=True):
        (large if own[0].numel() > PIECE and _can_be_cut(own) else whole).append(own)
    if whole:
        yield [list(tensors) for tensors in zip(*whole, strict=True)]
    for own in large:
        flat = (tensor.as_strided((tensor.numel(),), (1,)) for tensor in own)
        for pieces in zip(*(tensor.split(PIECE) for tensor in flat), strict=True):
            yield [[piece] for piece in pieces]


def _can_be_cut(own: Sequence[Tensor]) -> bool:
    """Whether the values of these tensors lie on the CPU without gaps, in the same order."""
    first = own[0]
    dense = first.is_contiguous() or (first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last))
    return first.is_cpu and dense and all(tensor.stride() == first.stride() for tensor in own)


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
