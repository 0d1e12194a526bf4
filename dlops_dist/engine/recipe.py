"""What a run is made of, and how its losses make one."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dlops_dist.config import Run
from dlops_dist.config.recipe_file import place_of
from dlops_dist.engine.device import is_of_memory
from dlops_dist.engine.samples import Inputs
from dlops_dist.errors import UserError, first_line
from dlops_dist.losses import Terms

TRIED = 4
"""Samples that each loss is tried on before a run."""


class Model(Protocol):
    """A module with a linear head."""

    fc: nn.Linear
    """The head: logits (N, C) of embeddings (N, D)."""
    embedding_dim: int

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings (N, D) of normalised images (N, 3, H, W)."""
        ...


class Loss(Protocol):
    """An `nn.Module` that gives the terms of some samples, and never divides. It knows nothing of ranks.

    `sees` says what it is given: a rank's "own" samples, or, gathered with gradient, "all" of the global batch, of
    whose terms it then gives those of the `anchors` alone. A loss may also have

        sums(x, labels), update(sums)    of state that the whole batch moves, once a step
        defined(host_labels)             whether a batch of these labels has any terms; always, by default
        hints(host_labels)               further keywords of `terms`, found without asking the device
        figures(x, labels, **hints)      what else is to be logged of a step, as scalars
    """

    reads: Literal["embeddings", "logits"]
    sees: Literal["own", "all"]

    def terms(self, x: Tensor, labels: Tensor, *anchors: slice) -> Terms:
        """Sum and number of the terms; of a loss that sees all, those of the anchors."""
        ...


@dataclass(frozen=True)
class Recipe:
    """What a run is made of. Built under the run's seed, so that initial weights depend on nothing else."""

    model: Any
    """A `Model`."""
    losses: Mapping[str, tuple[float, Any]]
    """{name: (weight, `Loss`)}. Where no loss of the logits has a weight, the head alone learns, on embeddings that it
    does not change."""
    balanced: bool = False
    """Whether batches are P classes x K samples unless data.order says otherwise."""
    directions: bool = False
    """Whether embeddings are compared by their directions alone."""


class Losses(nn.ModuleDict):
    """The losses of a run with their weights."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__({name: loss for name, (_, loss) in recipe.losses.items()})
        losses: dict[str, Any] = dict(self.items())
        self.weights = {name: weight for name, (weight, _) in recipe.losses.items()}
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

    def own_terms(self, embeddings: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Terms]:
        """The terms of some samples, of losses that know nothing of others."""
        outputs = {"embeddings": embeddings, "logits": logits}
        return {name: loss.terms(outputs[loss.reads], labels) for name, loss in self.of_own.items()}

    def all_terms(
        self, outputs: Mapping[str, Tensor], labels: Tensor, anchors: slice, host_labels: np.ndarray
    ) -> dict[str, Terms]:
        """The terms of some anchors among all samples, whose outputs are gathered."""
        return {
            name: loss.terms(outputs[loss.reads], labels, anchors, **hints(loss, host_labels))
            for name, loss in self.of_all.items()
        }

    def defined(self, host_labels: np.ndarray) -> bool:
        """Whether each loss has a term in a batch of these labels."""
        return all(is_defined(loss, host_labels) for loss in self.of_all.values())

    def total(self, values: Mapping[str, float | None]) -> float | None:
        """The loss of a run from its parts; None where one of them is of nothing."""
        parts = [(weight, values[name]) for name, weight in self.weights.items() if weight]
        return None if any(v is None for _, v in parts) else sum(w * v for w, v in parts if v is not None)


def made(settings: Run, inputs: Inputs, dry: bool = False) -> Recipe:
    """The recipe of a run, by the code that its settings come from, with the random numbers of the seed.

    Args:
        dry: only look at it: the model of a recipe of ours then takes no memory. A user's is built, to be checked.

    Raises:
        UserError: the code raises an error, or returns something else; names its file and line.
    """
    code = code_of(settings)
    where = f"{code.__file__}: recipe(settings, inputs)"
    if dry and settings.source is None:
        with torch.device("meta"):
            return code.recipe(settings, inputs)  # type: ignore[no-any-return]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        try:
            recipe = code.recipe(settings, inputs)
            if settings.source is not None:  # ours are tested
                _check(where, recipe, inputs)
        except UserError:
            raise
        except Exception as error:
            if settings.source is None or is_of_memory(error):
                raise
            place = place_of(error, Path(str(code.__file__)))
            raise UserError(f"{place}: {type(error).__name__}: {first_line(error)}") from error
    return recipe  # type: ignore[no-any-return]


def code_of(settings: Run) -> Any:
    """The module that a run's settings come from: what it does is there too."""
    return sys.modules[type(settings).__module__]


def _check(where: str, recipe: Any, inputs: Inputs) -> None:
    """Refuse, before anything is started, what no step could be made of."""
    if not isinstance(recipe, Recipe):
        raise UserError(f"{where} must return a Recipe, not a {type(recipe).__name__}")
    missing = [name for name in ("embed", "fc", "embedding_dim") if not hasattr(recipe.model, name)]
    if missing:
        raise UserError(f"{where}: the model has no {missing[0]}; Embedder(trunk, D, num_classes, image_size) has all")
    outputs = {
        "embeddings": torch.randn(TRIED, recipe.model.embedding_dim), "logits": torch.randn(TRIED, inputs.num_classes),
    }  # fmt: skip
    for name, value in recipe.losses.items():
        _check_loss(f"{where}: losses[{name!r}]", value, outputs, np.arange(TRIED) // 2 % inputs.num_classes)
    if not any(loss.reads == "logits" for _, loss in recipe.losses.values()):
        raise UserError(f"{where}: no loss reads the logits; add CrossEntropyLoss() with weight 0 to judge the head")


@torch.no_grad()
def _check_loss(where: str, value: Any, outputs: Mapping[str, Tensor], labels: np.ndarray) -> None:
    match value:
        case (int() | float(), nn.Module() as loss) if callable(getattr(loss, "terms", None)):
            pass
        case (int() | float(), _):
            raise UserError(f"{where} must be a module with terms(x, labels); Whole(function) makes one of a function")
        case _:
            raise UserError(f"{where} must be (weight, loss), not {value!r:.60}")
    tried: Any = loss
    if getattr(loss, "reads", None) not in outputs or getattr(loss, "sees", None) not in ("own", "all"):
        raise UserError(f"{where} must say what it reads ('embeddings' or 'logits') and sees ('own' or 'all')")
    more = (slice(0, TRIED),) if loss.sees == "all" else ()
    terms = tried.terms(outputs[tried.reads], torch.tensor(labels.tolist()), *more, **hints(loss, labels))
    if not isinstance(terms, Terms) or not isinstance(terms.sum, Tensor) or terms.sum.ndim:
        raise UserError(f"{where}: terms must give Terms(sum, count), the sum a scalar tensor, not {terms!r:.60}")


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
