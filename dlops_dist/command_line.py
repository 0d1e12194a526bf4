"""A command line into settings: a YAML file, then dotted overrides."""

import contextlib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

import yaml

from dlops_dist.config import DEFAULT, RecipeFile, Run, Sweep, load_recipe, stem_of, sweep_type
from dlops_dist.config.section import setting_names, unknown_setting
from dlops_dist.errors import OneLineParser, UserError

CONFIG_FOLDERS = [Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs"]  # wheel, checkout


def read_settings(name: str, arguments: Sequence[str]) -> Run:
    """Settings for a recipe: its YAML file (or --config), then --smoke, then the other command-line overrides."""
    recipe = load_recipe(name)
    return cast(Run, _read(recipe.settings_type, recipe, arguments, [f"{name}.yaml"], recipe.smoke, "train"))


def read_sweep(name: str, arguments: Sequence[str]) -> Sweep:
    """Settings of a sweep over a recipe, in the same way; of a trial, --smoke keeps all but that it needs no Ray."""
    recipe = load_recipe(name)
    held_out = {**recipe.smoke["data"], "val_fraction": 0.25}
    smoke = {**recipe.smoke, "local": False, "workers": 1, "num_samples": 2, "data": held_out}
    files = [f"tune-{name}.yaml", *(["tune.yaml"] if name == DEFAULT else [])]
    return cast(Sweep, _read(sweep_type(recipe.settings_type), recipe, arguments, files, smoke, "tune"))


def _read(
    kind: type[Run], recipe: RecipeFile, arguments: Sequence[str], packaged: Sequence[str], smoke: dict[str, Any],
    command: str,
) -> Any:  # fmt: skip
    first = OneLineParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--smoke", action="store_true")
    known, _ = first.parse_known_args(arguments)
    file = Path(known.config) if known.config else _packaged_config(packaged)
    values = read_yaml(file) if file else {}
    if stem_of(written_for := str(values.pop("task", recipe.name))) != stem_of(recipe.name):
        raise UserError(f"--config {known.config} is for the recipe {written_for}, not {recipe.name}")
    if known.smoke or values.get("smoke"):
        values = _merged(values, smoke)
    return override(kind(**values), arguments, f"python -m dlops_dist.{command} {recipe.name}")


def override(defaults: Any, arguments: Sequence[str], prog: str) -> Any:
    """Settings, or those of a type, where the arguments of a command say otherwise."""
    import tyro

    kind, given = (defaults, {}) if isinstance(defaults, type) else (type(defaults), {"default": defaults})
    box = io.StringIO()
    help_wanted = {"-h", "--help"} & set(arguments)
    wide = {} if help_wanted else {"COLUMNS": "10000"}  # an error must not be broken into lines
    try:
        with contextlib.redirect_stderr(box), mock.patch.dict(os.environ, wide):
            settings, unknown = tyro.cli(kind, **given, args=list(arguments), prog=prog, return_unknown_args=True)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_first_sentence(box.getvalue())) from None
    if unknown:
        raise UserError(unknown_setting(unknown[0], [f"--{name}" for name in setting_names(kind)]))
    return settings


def _first_sentence(box: str) -> str:
    """The message of tyro's error box, without its frame (of blanks where stdout is not UTF-8) and its help."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith(("│", "  "))]
    end = next((i for i, line in enumerate(lines) if line.startswith(("──", "--"))), len(lines))
    return " ".join(lines[:end])


class _Yaml12Loader(yaml.SafeLoader):
    """Only true and false are booleans: `wandb: off` is a word."""


_Yaml12Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml12Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|false"), list("tf"))


def _packaged_config(names: Sequence[str]) -> Path | None:
    files = [folder / name for folder in CONFIG_FOLDERS for name in names]
    return next((file for file in files if file.is_file()), None)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a file, as they stand there."""
    try:
        return parse_yaml(str(path), path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def parse_yaml(name: str, content: bytes) -> dict[str, Any]:
    """The settings in the content of a file of that name."""
    try:
        values = yaml.load(content, _Yaml12Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{name} must hold settings as 'name: value', not a {type(values).__name__}")
    return _with_text_names(name, values)


def _with_text_names(file: str, values: dict[Any, Any]) -> dict[str, Any]:
    for name, value in values.items():
        if not isinstance(name, str):
            raise UserError(f"{file}: {name!r} is not the name of a setting; quote it if it is meant as text")
        if isinstance(value, dict):
            _with_text_names(file, value)
    return values


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(base[k], v) for k, v in top.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **top, **both}
