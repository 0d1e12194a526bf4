"""How the losses of a run make one: what a loss is, and what is asked of all of them together."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor, nn

from dlops_dist.losses import Terms


class Loss(Protocol):
    """An `nn.Module` that gives the terms of some samples, and never divides. It knows nothing of ranks.

    `sees` says what it is given: a rank's "own" samples, or, gathered with gradient, "all" of the global batch, of
    whose terms it then gives those of the `anchors` alone. A loss may also have

        sums(x, labels), update(sums)    of state that the whole batch moves, once a step
        defined(host_labels)             whether a batch of these labels has any terms; always, by default
        hints(host_labels)               further keywords of `terms`, found without asking the device
        shared(x, labels)                a keyword of `terms`: what all anchors have in common, computed once a step
        figures(x, labels, **hints)      what else is to be logged of a step, as scalars
        takes_mixed                      True where labels may be parts (n, C) of classes, as mixup makes them
    """

    reads: str
    """"embeddings" or "logits"; of a network of another kind, one of its outputs."""
    sees: Literal["own", "all"]

    def terms(self, x: Tensor, labels: Tensor, *anchors: slice) -> Terms:
        """Sum and number of the terms; of a loss that sees all, those of the anchors."""
        ...


class Losses(nn.ModuleDict):
    """The losses of a run with their weights."""

    def __init__(self, weighted: Mapping[str, tuple[float, Any]]) -> None:
        super().__init__({name: loss for name, (_, loss) in weighted.items()})
        losses: dict[str, Any] = dict(self.items())
        self.weights = {name: weight for name, (weight, _) in weighted.items()}
        self.of_own = {name: loss for name, loss in losses.items() if loss.sees == "own"}
        self.of_all = {name: loss for name, loss in losses.items() if loss.sees == "all"}
        self.read_by_all: list[str] = sorted({loss.reads for loss in self.of_all.values()})
        """Outputs that are to be gathered."""
        self.moved = [loss for loss in losses.values() if hasattr(loss, "update")]
        """Those with a state that every step moves."""
        of_logits = [name for name, loss in losses.items() if loss.reads == "logits"]
        self.detach_head = not any(self.weights[name] for name in of_logits)
        self.backward_weights = {
            name: weight or float(self.detach_head and name in of_logits) for name, weight in self.weights.items()
        }
        """The weights of what is back-propagated: a head on detached embeddings learns with weight 1."""

    def own_terms(self, outputs: Mapping[str, Tensor], targets: Tensor) -> dict[str, Terms]:
        """The terms of some samples, of losses that know nothing of others."""
        return {name: loss.terms(outputs[loss.reads], targets) for name, loss in self.of_own.items()}

    def all_terms(
        self, outputs: Mapping[str, Tensor], labels: Tensor, anchors: slice, host_labels: np.ndarray,
        shared: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    ) -> dict[str, Terms]:  # fmt: skip
        """The terms of some anchors among all samples, whose outputs are gathered."""
        return {
            name: loss.terms(outputs[loss.reads], labels, anchors, **hints(loss, host_labels), **shared.get(name, {}))
            for name, loss in self.of_all.items()
        }

    def shared(self, outputs: Mapping[str, Tensor], labels: Tensor) -> dict[str, dict[str, Any]]:
        """What the anchors of all blocks have in common, of losses that compute such a thing."""
        sharing = {name: loss for name, loss in self.of_all.items() if hasattr(loss, "shared")}
        return {name: {"shared": loss.shared(outputs[loss.reads], labels)} for name, loss in sharing.items()}

    def defined(self, host_labels: np.ndarray) -> bool:
        """Whether each loss has a term in a batch of these labels."""
        return all(is_defined(loss, host_labels) for loss in self.of_all.values())

    def total(self, values: Mapping[str, float | None]) -> float | None:
        """The loss of a run from its parts; None where one of them is of nothing."""
        parts = [(weight, values[name]) for name, weight in self.weights.items() if weight]
        return None if any(v is None for _, v in parts) else sum(w * v for w, v in parts if v is not None)


def hints(loss: Any, host_labels: np.ndarray) -> dict[str, Any]:
    return loss.hints(host_labels) if hasattr(loss, "hints") else {}


def figures_of(
    losses: Iterable[Any], outputs: Mapping[str, Tensor], labels: Tensor, host_labels: np.ndarray
) -> dict[str, Tensor]:
    """What else some losses have to log."""
    found: dict[str, Tensor] = {}
    for loss in losses:
        if hasattr(loss, "figures"):
            found |= loss.figures(outputs[loss.reads].detach(), labels, **hints(loss, host_labels))
    return found


def is_defined(loss: Any, host_labels: np.ndarray) -> bool:
    return bool(loss.defined(host_labels)) if hasattr(loss, "defined") else True
