"""Where a run begins: with weights that were trained elsewhere, and with parts of the model that stay as they are."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlops_dist.engine.run_folder import CONFIG, RunFolder
from dlops_dist.errors import UserError, first_line
from dlops_dist.files import Folder

SHOWN = 3
INSIDE = ("model", "module", "trunk")
"""What may stand before the names of weights, here or there."""


def freeze(model: nn.Module, parts: Sequence[str]) -> list[nn.Module]:
    """Let no step change parts of a model; returns their modules, which are to stay in evaluation mode.

    Raises:
        UserError: there is no such part, or nothing is left to train.
    """
    modules, weights = dict(model.named_modules()), dict(model.named_parameters())
    for part in parts:
        if part not in weights and (part not in modules or not part):
            names = ", ".join(name for name, _ in model.named_children())
            raise UserError(f"freeze: the model has no part {part}; it has {names}, and what is in these (a.b)")
        (weights[part] if part in weights else modules[part]).requires_grad_(False)
    if not any(weight.requires_grad for weight in weights.values()):
        raise UserError("freeze: nothing of the model is left to train; freeze fewer parts")
    return [modules[part] for part in parts if part in modules]


def fitting_weights(place: str, model: nn.Module, warn: Callable[[str], None]) -> dict[str, Tensor]:
    """Those weights of a run or a file that fit a model, by the model's names. Tells of those that do not.

    Args:
        place: folder or URL of a run, whose result is taken; or a file of torch.save or safetensors.

    Raises:
        UserError: there is no such run or file, it holds no weights, or none of them fits.
    """
    wanted = model.state_dict()
    given = max(_renamed(_weights(place)), key=lambda named: len(wanted.keys() & named.keys()))
    fitting = {name: value for name, value in given.items() if name in wanted and value.shape == wanted[name].shape}
    if not fitting:
        there, here = (next(iter(names), "none") for names in (given, wanted))
        raise UserError(
            f"init_from: {place}: none of its {len(given)} weights fits the model ({there} there, {here} here)"
        )
    shapes = [
        f"{n} {_shape(given[n])} there, {_shape(wanted[n])} here" for n in given.keys() & wanted.keys() - fitting.keys()
    ]
    for what, names in (
        ("have another shape", sorted(shapes)),
        ("are not in it, and begin anew", [name for name in wanted if name not in given]),
        ("are not in this model", [name for name in given if name not in wanted]),
    ):
        if names:
            shown = ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)
            warn(f"init_from: {place}: {len(names)} weights {what}: {shown}")
    return fitting


def _weights(place: str) -> dict[str, Tensor]:
    path = Path(place)
    if not path.is_file() and CONFIG in Folder(place).names():
        state = RunFolder(place).result(torch.device("cpu"), warn=lambda _: None)
        return dict(state.get("ema", state["model"]))
    if not path.is_file():
        raise UserError(f"init_from: {place}: there is no such run or file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise UserError(f"init_from: {place}: {first_line(error)}; run pip install safetensors") from None
    except Exception as error:  # torch and zipfile raise many kinds
        raise UserError(f"init_from: {place} holds no weights that can be read ({type(error).__name__})") from None
    for name in ("state_dict", "model"):
        found = found[name] if isinstance(found, dict) and isinstance(found.get(name), dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"init_from: {place} holds no weights by name")
    return found


def _renamed(weights: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """As they are, and with the usual words before their names left out or put there."""
    yield weights
    for word in INSIDE:
        yield {name.removeprefix(f"{word}."): value for name, value in weights.items()}
        yield {f"{word}.{name}": value for name, value in weights.items()}


def _shape(x: Tensor) -> str:
    return "x".join(map(str, x.shape)) or "scalar"
