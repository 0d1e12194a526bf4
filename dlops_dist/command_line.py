"""A command line into settings: those of a YAML file, then of --smoke, then dotted options; pydantic reads them all."""

import argparse
import re
import sys
from collections.abc import Sequence
from functools import reduce
from inspect import cleandoc
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dlops_dist.config import DEFAULT, RecipeFile, Run, Sweep, flat, load_recipe, stem_of, sweep_type
from dlops_dist.config.section import (
    Section,
    SettingError,
    dotted,
    is_section,
    mistake_in,
    setting_names,
    unknown_setting,
)
from dlops_dist.config.yaml_file import content_of, line_of, parse_yaml
from dlops_dist.errors import OneLineParser, UserError

CONFIG_FOLDERS = [Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs"]  # wheel, checkout
S = TypeVar("S", bound=Section)
LINE, SMOKE = "command line", "--smoke"
SEVERAL = ("workers", "min_workers")
"""Settings of several processes."""
SEVERAL_WORDS = (tuple, list, set, frozenset)
FLAGS = "A setting that is true or false, x.y say, is set by --x.y, --x.no-y or --x.y False."


class CommandLine(NamedTuple):
    """What a command line asks for."""

    settings: Run
    origins: dict[str, str]
    """Of settings that are not the default: a file, --smoke, or the command line."""
    dry_run: bool


def read_settings(name: str, arguments: Sequence[str]) -> Run:
    """Settings for a recipe: its YAML file (or --config), then --smoke, then the other command-line overrides."""
    return read_command_line(name, arguments, dry_run=False).settings


def read_command_line(name: str, arguments: Sequence[str], *, dry_run: bool = True) -> CommandLine:
    """The same, and what else it says; --dry-run only where that is offered."""
    recipe = load_recipe(name)
    parser = _parser(recipe.settings_type, f"python -m dlops_dist.train {recipe.name}")
    if dry_run:
        parser.add_argument("--dry-run", action="store_true", help="print what would be run, and start nothing")
    return _read(recipe.settings_type, recipe, parser, arguments, [f"{name}.yaml"], recipe.smoke)


def read_sweep(name: str, arguments: Sequence[str]) -> Sweep:
    """Settings of a sweep over a recipe, in the same way; of a trial, --smoke keeps all but that it needs no Ray."""
    recipe = load_recipe(name)
    held_out = {**recipe.smoke["data"], "val_fraction": 0.25}
    smoke = {**recipe.smoke, "local": False, "workers": 1, "num_samples": 2, "data": held_out}
    files = [f"tune-{name}.yaml", *(["tune.yaml"] if name == DEFAULT else [])]
    kind = sweep_type(recipe.settings_type)
    parser = _parser(kind, f"python -m dlops_dist.tune {recipe.name}")
    return cast(Sweep, _read(kind, recipe, parser, arguments, files, smoke).settings)


def read_options(kind: type[S], arguments: Sequence[str], prog: str) -> S:
    """Settings of a command that reads no file of them."""
    parser = _parser(kind, prog)
    given = _given(parser, kind, arguments)
    if given.pop("help", False):
        parser.set_defaults(**{name: field.default for name, field in kind.model_fields.items()})
        parser.print_help()
        parser.exit()
    try:
        return kind(**given)
    except ValidationError as error:
        raise mistake_in(kind, error) from None


def _read(
    kind: type[Run], recipe: RecipeFile, parser: OneLineParser, arguments: Sequence[str], packaged: Sequence[str],
    smoke: dict[str, Any],
) -> CommandLine:  # fmt: skip
    given = _given(parser, kind, arguments)
    dry_run, help_wanted = given.pop("dry_run", False), given.pop("help", False)
    if help_wanted:
        given = {name: value for name, value in given.items() if name in ("config", "smoke")}
    file = _named_config(given["config"]) if given.get("config") else _packaged_config(packaged)
    content = content_of(file) if file else b""
    values = parse_yaml(str(file), content)
    if stem_of(written_for := str(values.pop("task", recipe.name))) != stem_of(recipe.name):
        raise UserError(f"--config {file} is for the recipe {written_for}, not {recipe.name}")
    smoke = smoke if given.get("smoke", values.get("smoke")) else {}
    merged, origins = _overlaid({str(file): values, SMOKE: smoke, LINE: _nested(given)})
    try:
        settings = kind(**merged)
    except SettingError as error:
        where = f"{file}:{line_of(content, error.place)}: " if _is_from(str(file), error.place, origins) else ""
        raise UserError(f"{where}{error}") from None
    if help_wanted:
        names = setting_names(kind)
        parser.set_defaults(**{name: reduce(getattr, name.split("."), cast(Any, settings)) for name in names})
        parser.print_help()
        parser.exit()
    for name in SEVERAL:
        number = getattr(settings, name) or 1
        if settings.local and number > 1:
            way_out = "leave out --local" if origins.get("local") == LINE else "pass --no-local"
            raise UserError(f"{name}: {number} processes need Ray; {way_out}")
    return CommandLine(settings, origins, dry_run)


def _parser(kind: type[Section], prog: str) -> OneLineParser:
    """Of options for all settings; it leaves out what is not given."""
    wide = {} if sys.stdout.isatty() else {"width": 10_000, "max_help_position": 1_000}  # a line for each option
    formatter = argparse.RawDescriptionHelpFormatter if kind.positional else argparse.HelpFormatter
    words, flags = (f"{kind.positional.upper()} ", "") if kind.positional else ("", f" {FLAGS}")
    parser = OneLineParser(
        prog, f"{prog} {words}[--SETTING VALUE ...]", f"{cleandoc(kind.__doc__ or '')}{flags}",
        argument_default=argparse.SUPPRESS, conflict_handler="resolve",
        formatter_class=lambda prog: formatter(prog, **cast(Any, wide)),
        add_help=False, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("-h", "--help", action="store_true", help="show this, and what the settings are")
    _add_group(parser, kind, ())
    return parser


def _add_group(parser: OneLineParser, kind: type[BaseModel], place: tuple[str, ...]) -> None:
    group = parser.add_argument_group(dotted(place) or "settings", kind.__doc__ if place else None)
    for name, field in kind.model_fields.items():
        if is_section(field.annotation):
            _add_group(parser, field.annotation, (*place, name))
        elif name == getattr(kind, "positional", None):
            several = get_origin(field.annotation) in SEVERAL_WORDS
            parser.add_argument(
                name, nargs="*" if several else "?", metavar=_shown(field.annotation), help=field.description
            )
        else:
            _add_option(group, (*place, name), field, bare=bool(getattr(kind, "positional", None)))


def _add_option(group: Any, place: tuple[str, ...], field: FieldInfo, bare: bool) -> None:
    """An option whose words are left to pydantic, but for None and, of flags, what is not True or False.

    Args:
        bare: a flag takes no word: what follows it may be a positional one.
    """
    kinds = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else [field.annotation]
    option: dict[str, Any] = {"dest": dotted(place), "metavar": "|".join(map(_shown, kinds))}
    option["help"] = f"{(field.description or '').replace('%', '%%')} (default: %(default)s)"
    if bool in kinds and bare:
        group.add_argument(
            _dashed(f"--{dotted(place)}"), dest=dotted(place), action="store_true", help=field.description
        )
        return
    if bool in kinds:
        option |= {"nargs": "?", "const": True, "type": _truth}
        inverse = _dashed(f"--{dotted((*place[:-1], f'no-{place[-1]}'))}")
        group.add_argument(inverse, dest=dotted(place), action="store_false", help=argparse.SUPPRESS)
    elif any(get_origin(kind) in SEVERAL_WORDS for kind in kinds):
        option["nargs"] = "*"
    elif NoneType in kinds:
        option["type"] = lambda word: None if word == "None" else word
    group.add_argument(_dashed(f"--{dotted(place)}"), **option)


def _shown(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) in (Annotated, *SEVERAL_WORDS):
        return _shown(get_args(kind)[0])
    return "None" if kind is NoneType else str(getattr(kind, "__name__", kind)).upper()


def _truth(word: str) -> bool | None:
    words = {"true": True, "false": False, "none": None}
    if word.lower() not in words:
        raise argparse.ArgumentTypeError(f"{word!r} must be True or False")
    return words[word.lower()]


def _dashed(word: str) -> str:
    """An option may be written with underscores, too."""
    return re.sub("^--[^=]*", lambda name: name[0].replace("_", "-"), word)


def _given(parser: OneLineParser, kind: type[Section], arguments: Sequence[str]) -> dict[str, Any]:
    """{dotted name: words} of the options that are there."""
    known, unknown = parser.parse_known_intermixed_args([_dashed(word) for word in arguments])
    if unknown:
        name = next(word for word in arguments if _dashed(word) == unknown[0]).split("=", maxsplit=1)[0]
        raise UserError(unknown_setting(name, [_dashed(f"--{known}") for known in setting_names(kind)]))
    return vars(known)


def _named_config(name: str) -> Path:
    """A user's file, or one that comes with the package by its bare name."""
    is_ours = Path(name).name == name and not Path(name).is_file()
    return (_packaged_config([f"{name}.yaml"]) if is_ours else None) or Path(name)


def _packaged_config(names: Sequence[str]) -> Path | None:
    files = [folder / name for folder in CONFIG_FOLDERS for name in names]
    return next((file for file in files if file.is_file()), None)


def _overlaid(layers: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """All layers in one, the later ones on top, and which of them each setting is from.

    Where one says that a run is local, it takes back what those below say of several processes.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers.items():
        if layer.get("local"):
            values = {name: value for name, value in values.items() if name not in SEVERAL}
            origins = {name: of for name, of in origins.items() if name not in SEVERAL}
        values = _merged(values, layer)
        origins |= dict.fromkeys(flat(layer), origin)
    return values, origins


def _is_from(origin: str, place: Sequence[Any], origins: dict[str, str]) -> bool:
    """Whether what stands at a place, and all in it, is from one origin alone."""
    inside = f"{dotted(place)}."
    found = {of for name, of in origins.items() if inside.startswith(f"{name}.") or name.startswith(inside)}
    return found == {origin}


def _nested(given: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in given.items():
        *groups, last = name.split(".")
        inner = values
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    return values


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(base[k], v) for k, v in top.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **top, **both}
