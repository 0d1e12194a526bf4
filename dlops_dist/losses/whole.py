"""Anybody's loss of a whole batch."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dlops_dist.losses.terms import Terms, at_least_float32


class Whole(nn.Module):
    """Any function of a batch's embeddings (N, D) and labels (N,) that gives one number, its mean say.

        L = function(x, y)

    Each rank computes all of it, on the embeddings of all ranks, and keeps the gradient of its own rows: no collective
    in the backward pass, no factor, the same for any number of ranks. The price is that each rank computes all of it.
    Weights of the function, where it is a module, see the same gradient on every rank.

    Args:
        function: may be a module, a loss of pytorch-metric-learning say.
        reads: "embeddings", or "logits".
    """

    sees = "all"

    def __init__(
        self, function: Callable[[Tensor, Tensor], Tensor], reads: Literal["embeddings", "logits"] = "embeddings"
    ) -> None:
        super().__init__()
        self.function, self.reads = function, reads

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.terms(x, labels).mean()

    def terms(self, x: Tensor, labels: Tensor, anchors: slice | None = None, shared: "Computed | None" = None) -> Terms:
        """As many terms as anchors, each of them the loss: those of all ranks are N, and their mean is the loss."""
        first, last, _ = (anchors or slice(None)).indices(len(x))
        value, gradients = shared or self.shared(x, labels)
        number = last - first
        if not gradients:
            return Terms(value * number, number)
        own = torch.zeros_like(gradients[0])
        own[first:last] = gradients[0][first:last] * len(x)
        known = [own, *(g * number for g in gradients[1:])]
        return Terms(_Known.apply(value * number, known, x, *self._weights()), number)

    def shared(self, x: Tensor, labels: Tensor) -> "Computed":
        """What all anchors of a batch have in common: the whole, computed once."""
        weights = self._weights()
        wanted = torch.is_grad_enabled() and (x.requires_grad or bool(weights))
        leaf = at_least_float32(x.detach()).requires_grad_(wanted)
        with torch.set_grad_enabled(wanted):
            value = self.function(leaf, labels)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"a loss of a whole batch must give one number, not {shape}")
        value = value.reshape(())
        return Computed(value.detach(), _gradients(value, [leaf, *weights]) if wanted else [])

    def _weights(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]


class Computed(NamedTuple):
    """A loss of a whole batch, and its gradients with respect to embeddings and weights, where these are wanted."""

    value: Tensor
    gradients: list[Tensor]


def _gradients(value: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Zeros for what the value does not depend on."""
    if not value.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(value, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


class _Known(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:  # type: ignore[override]
        ctx.gradients = [g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True)]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, d_value: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return None, None, *(g * d_value.to(g.dtype) for g in ctx.gradients)
