"""Where a run's code comes from: a recipe of ours by its name, a user's by the path of its file or by its module."""

import hashlib
import importlib
import importlib.util
import sys
import traceback
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from dlops_dist.config.run import Run
from dlops_dist.errors import UserError, first_line

OURS = "dlops_dist.recipes"
SHIPPED = tuple(sorted(path.stem for path in (Path(__file__).parents[1] / "recipes").glob("[a-z]*.py")))
"""Names of the recipes that come with the package."""
DEFAULT = SHIPPED[0]
SMOKE: dict[str, Any] = {
    "smoke": True, "local": True, "epochs": 2, "global_batch_size": 40, "data": {"reader": "decode"},
}  # fmt: skip
"""What --smoke changes, besides what a recipe adds to it in its own SMOKE."""


_loaded: dict[str, "RecipeFile"] = {}


@dataclass(frozen=True)
class RecipeFile:
    """A module that says what a run is made of: its `Settings`, and `recipe(settings, inputs)`, which makes a `Recipe`.

    Optional names in it:
        stages           stages(settings, samples, device, tell) of a run that trains several things
        SMOKE            settings of a trial of seconds
        SMOKE_DATASET    "shapes" (by default) or "shapes-stl10": what generated data that is on
        STUDY            published figures, which `report` shows beside those of runs on the same data
    """

    name: str
    """What the user calls it by."""
    source: bytes
    module: ModuleType

    @property
    def sha256(self) -> str | None:
        """Of a user's file: a part of what his run is. Ours change with the package."""
        return None if self.name in SHIPPED else hashlib.sha256(self.source).hexdigest()

    @property
    def settings_type(self) -> type[Run]:
        return self.module.Settings  # type: ignore[no-any-return]

    @cached_property
    def smoke(self) -> dict[str, Any]:
        own = getattr(self.module, "SMOKE", {})
        return {**SMOKE, **own, "data": {**SMOKE["data"], **own.get("data", {})}}


def load_recipe(name: str) -> RecipeFile:
    """The recipe of that name, executed where its file is new or has changed.

    Raises:
        UserError: there is none, its code raises an error, or it is no recipe.
    """
    if name not in _loaded:
        if name in SHIPPED:
            module = importlib.import_module(f"{OURS}.{name}")
            _loaded[name] = RecipeFile(name, Path(str(module.__file__)).read_bytes(), module)
        else:
            _loaded[name] = _checked(_from_path(Path(name)) if name.endswith(".py") else _from_module(name))
    elif name.endswith(".py") and Path(name).is_file() and Path(name).read_bytes() != _loaded[name].source:
        _loaded[name] = _checked(_from_path(Path(name)))
    return _loaded[name]


def stem_of(name: str) -> str:
    """What the runs of a recipe are named after."""
    return Path(name).stem if name.endswith(".py") else name.rpartition(".")[2]


def check_task(name: str, settings: Run) -> None:
    """Refuse settings of another recipe than the named one.

    Raises:
        UserError: they are.
    """
    ours = type(settings).__module__ == f"{OURS}.{name}"
    if not (ours if name in SHIPPED else settings.source is not None):
        raise UserError(f"task: these settings are not of the recipe {name}; name the one that they come from")


def is_loaded(name: str) -> bool:
    """Whether a recipe is ours, or one that the user has pointed to: code comes from nowhere else."""
    return name in SHIPPED or name in _loaded


def recipe_from_source(name: str, source: bytes) -> RecipeFile:
    """A user's recipe that another process has read: a Ray worker need not see its file."""
    if name in SHIPPED:
        return load_recipe(name)
    _loaded[name] = _checked(RecipeFile(name, source, _executed(Path(name).absolute(), source)))
    return _loaded[name]


def _checked(recipe: RecipeFile) -> RecipeFile:
    settings = getattr(recipe.module, "Settings", None)
    if not (isinstance(settings, type) and issubclass(settings, Run)):
        raise UserError(f"{recipe.name} is no recipe: it has no class Settings(dlops_dist.Run)")
    if not callable(getattr(recipe.module, "recipe", None)):
        raise UserError(f"{recipe.name} is no recipe: it has no function recipe(settings, inputs)")
    settings.source = recipe.sha256
    return recipe


def place_of(error: BaseException, file: Path) -> str:
    """FILE:LINE of a user's recipe that an error came through."""
    path = str(file)
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"{path}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f"{path}:{lines[-1]}" if lines else path


def _from_path(path: Path) -> RecipeFile:
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; recipes of ours are {', '.join(SHIPPED)}") from None
    return RecipeFile(str(path), source, _executed(path.absolute(), source))


def _from_module(name: str) -> RecipeFile:
    sys.path[:0] = [] if "" in sys.path else [""]
    try:
        found = importlib.util.find_spec(name) if all(part.isidentifier() for part in name.split(".")) else None
    except ModuleNotFoundError:
        found = None
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        raise UserError(
            f"unknown recipe {name!r}: choose from {', '.join(SHIPPED)}, or pass the path of a file that ends in .py"
        )
    path = Path(found.origin)
    return RecipeFile(name, path.read_bytes(), _executed(path, path.read_bytes()))


def _executed(path: Path, source: bytes) -> ModuleType:
    """The module of a file, which finds what lies beside it."""
    module = ModuleType(f"{path.stem}_{hashlib.sha256(source).hexdigest()[:8]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where pydantic looks up the names in annotations
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{place_of(error, path)}: {what}") from None
    return module
