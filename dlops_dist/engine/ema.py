"""A model that follows another: the exponential moving average of its weights."""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class Ema(Generic[M]):
    """Weights and running statistics averaged over the steps of a training (Polyak & Juditsky 1992).

        theta' <- d theta' + (1 - d) theta,   d = min(decay, (1 + t) / (10 + t)) after step t = 0, 1, ...

    The smaller d of the first steps forgets the initial weights. Nothing but t is needed to go on: no state besides
    the model's own.
    """

    def __init__(self, model: M, decay: float) -> None:
        self.model, self._decay = copy.deepcopy(model).requires_grad_(False), decay
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the step numbered so, from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        own, followed = (list(side) for side in zip(*self._averaged, strict=True))
        torch._foreach_lerp_(own, followed, 1 - decay)
        for count, other in self._copied:
            count.copy_(other)
