"""What a run is made of, and what is refused of what a user brings."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dlops_dist.config import Run
from dlops_dist.config.recipe_file import place_of
from dlops_dist.data.loader import Batches
from dlops_dist.data.transforms import transformed
from dlops_dist.distributed.exact import inexact_allowed
from dlops_dist.engine.descent import MakeOptimizer, named_weights
from dlops_dist.engine.device import is_of_memory
from dlops_dist.engine.losses import Losses, hints
from dlops_dist.engine.samples import Inputs
from dlops_dist.errors import RunError, UserError, first_line
from dlops_dist.losses import Terms
from dlops_dist.metrics import Judged, Metric

TRIED = 4
"""Samples that whatever a user brings is tried on before a run."""


class Model(Protocol):
    """A module with a linear head."""

    fc: nn.Linear
    """The head: logits (N, C) of embeddings (N, D)."""
    embedding_dim: int

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings (N, D) of normalised images (N, 3, H, W)."""
        ...


@dataclass(frozen=True)
class Recipe:
    """What a run is made of. Built under the run's seed, so that initial weights depend on nothing else."""

    model: Any
    """A `Model`."""
    losses: Mapping[str, tuple[float, Any]]
    """{name: (weight, `Loss`)}. Where no loss of the logits has a weight, the head alone learns, on embeddings that it
    does not change."""
    optimizer: MakeOptimizer | None = None
    """Makes an optimiser of torch.optim of the named weights [(name, weight), ...], with groups perhaps, whose learning
    rates are then the peaks of the schedule; by default SGD with the settings of `optimizer`."""
    balanced: bool = False
    """Whether batches are P classes x K samples unless data.order says otherwise."""
    batches: Batches | None = None
    """An order of its own, (seed, epoch, labels) -> batches of places among the labels: a pure function."""
    augment: Any = None
    """Changes of the training images besides those of the settings: `Keyed(function, num_draws)`, or any transform of
    one uint8 image (3, H, W), of torchvision.transforms.v2 say, which is then run under a random state for each."""
    views: int = 1
    """How often a step sees each sample, each time changed anew: labels are repeated, the views of a sample adjoin."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """{name: `Metric`} of evaluations, besides those that all runs have."""
    directions: bool = False
    """Whether embeddings are compared by their directions alone."""
    inexact: tuple[str, ...] = ()
    """What in the model depends on the number of ranks, where --inexact lets it; found, not given."""


def made(settings: Run, inputs: Inputs, dry: bool = False) -> Recipe:
    """The recipe of a run, by the code that its settings come from, with the random numbers of the seed.

    Args:
        dry: only look at it: the model of a recipe of ours then takes no memory. A user's is built, to be checked.

    Raises:
        UserError: the code raises an error, or returns something else; names its file and line.
    """
    code = code_of(settings)
    if dry and settings.source is None:
        with torch.device("meta"), _Undrawn():
            return code.recipe(settings, inputs)  # type: ignore[no-any-return]
    with torch.random.fork_rng(devices=[]), mistakes_placed(settings):
        torch.default_generator.manual_seed(settings.seed)
        with inexact_allowed(settings.inexact) as notes:
            recipe = code.recipe(settings, inputs)
        if settings.source is not None:  # ours are tested
            _check(_called(settings), recipe, inputs)
    return replace(recipe, inexact=tuple(notes))  # type: ignore[no-any-return]


class _Undrawn(TorchFunctionMode):
    """No random numbers are drawn for weights without memory: torch would import its compiler to do so."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if function in (Tensor.normal_, Tensor.uniform_) else function(*args, **(kwargs or {}))


@contextmanager
def mistakes_placed(settings: Run) -> Iterator[None]:
    """Before a run: whatever a user's recipe raises, or gives that cannot be, is a mistake; the line names where."""
    try:
        yield
    except Exception as error:
        line = _line_of(settings, error)
        if settings.source is None or is_of_memory(error) or (isinstance(error, UserError) and line is None):
            raise
        raise UserError(f"{line or _called(settings)}: {_said(error)}") from error


@contextmanager
def failures_placed(settings: Run) -> Iterator[None]:
    """While a run goes on: what the code of a user's recipe raises ends it by a line that names where."""
    try:
        yield
    except Exception as error:
        line = _line_of(settings, error)
        if line is None or is_of_memory(error) or isinstance(error, UserError | RunError):
            raise
        raise RunError(f"{line}: {_said(error)}") from error


def _line_of(settings: Run, error: Exception) -> str | None:
    """FILE:LINE of a user's recipe that an error came through."""
    file = str(code_of(settings).__file__)
    place = place_of(error, Path(file))
    return None if settings.source is None or place == file else place


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, UserError | RunError) else f"{type(error).__name__}: {first_line(error)}"


def _called(settings: Run) -> str:
    return f"{code_of(settings).__file__}: recipe(settings, inputs)"


def code_of(settings: Run) -> Any:
    """The module that a run's settings come from: what it does is there too."""
    return sys.modules[type(settings).__module__]


def _check(where: str, recipe: Any, inputs: Inputs) -> None:
    """Refuse, before anything is started, what no step could be made of."""
    if not isinstance(recipe, Recipe):
        raise UserError(f"{where} must return a Recipe, not a {type(recipe).__name__}")
    _check_model(where, recipe.model, inputs)
    outputs = {
        "embeddings": torch.randn(TRIED, recipe.model.embedding_dim), "logits": torch.randn(TRIED, inputs.num_classes),
    }  # fmt: skip
    labels = np.arange(TRIED) // 2 % inputs.num_classes
    for name, value in recipe.losses.items():
        _check_loss(f"{where}: losses[{name!r}]", value, outputs, labels)
    if not any(loss.reads == "logits" for _, loss in recipe.losses.values()):
        raise UserError(f"{where}: no loss reads the logits; add CrossEntropyLoss() with weight 0 to judge the head")
    for name, metric in recipe.metrics.items():
        _check_metric(f"{where}: metrics[{name!r}]", metric, outputs, torch.from_numpy(labels))
    if recipe.optimizer is not None:
        _check_optimizer(f"{where}: optimizer", recipe)
    if recipe.augment is not None:
        images = torch.zeros(TRIED, *inputs.image_size, 3, dtype=torch.uint8)
        transformed(recipe.augment, images, torch.arange(TRIED), 0, 0)


@torch.no_grad()
def _check_model(where: str, model: Any, inputs: Inputs) -> None:
    missing = [name for name in ("embed", "fc", "embedding_dim") if not hasattr(model, name)]
    if missing:
        raise UserError(f"{where}: the model has no {missing[0]}; Embedder(trunk, D, num_classes, image_size) has all")
    model.eval()
    x = torch.rand(TRIED, 3, *inputs.image_size, dtype=next(model.parameters()).dtype)
    for what, part, width in (
        ("embeddings", model.embed, model.embedding_dim), ("logits", model.fc, inputs.num_classes),
    ):  # fmt: skip
        x = part(x)
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        if shape != (TRIED, width):
            raise UserError(f"{where}: the model gives {what} {shape} of {TRIED} images, not ({TRIED}, {width})")
        if not x.isfinite().all():
            raise UserError(f"{where}: the model gives {what} that are infinite or NaN")


def _check_metric(where: str, metric: Any, outputs: Mapping[str, Tensor], labels: Tensor) -> None:
    if not callable(metric):
        raise UserError(f"{where} must be a function of what is judged, not {metric!r:.60}")
    embeddings, logits = outputs.values()
    logits = logits[:, :0] if getattr(metric, "sees", "own") == "all" else logits
    means = torch.zeros(logits.shape[1], embeddings.shape[1])
    values = metric(Judged(embeddings, labels, logits, means, embeddings, labels, slice(0, TRIED), TRIED))
    if not isinstance(values, Tensor) or values.shape != (TRIED,):
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise UserError(f"{where} must give one number for each of {TRIED} samples, ({TRIED},), not {shape}")


def _check_optimizer(where: str, recipe: Recipe) -> None:
    wanted = dict(named_weights(recipe.model, Losses(recipe.losses)))
    optimizer: Any = recipe.optimizer and recipe.optimizer(list(wanted.items()))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"{where} must make a torch.optim.Optimizer of the weights, not a {type(optimizer).__name__}")
    taken = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left = [name for name, p in wanted.items() if id(p) not in taken]
    if left:
        raise UserError(f"{where} leaves out the weights {left[0]}; what is not to be trained is named by --freeze")


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
