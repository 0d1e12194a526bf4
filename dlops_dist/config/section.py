"""A group of settings that is validated as it is read, and what a mistake in it looks like."""

from collections.abc import Collection
from difflib import SequenceMatcher
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeGuard

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from dlops_dist.errors import UserError


def _here(place: Any) -> Any:
    if "://" in str(place):
        raise ValueError("must be a path on this machine; nothing is fetched")
    return place


LocalPath = Annotated[Path, BeforeValidator(_here)]
"""Of a file or folder here: a URL would become a folder of a strange name."""
NEAR = 0.65
"""How alike two names are, from 0 to 1, where one may be meant by the other."""


class Section(BaseModel):
    """A group of settings. Unknown names are refused; values never change after they were read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
    positional: ClassVar[str | None] = None
    """The setting of a command whose words need no option before them."""


class SettingError(UserError):
    """The first mistake among some settings: which one, its value, what is allowed."""

    place: tuple[int | str, ...] = ()
    """Names of the groups that it is in, and its own; only the group's where several settings do not fit together."""


def mistake_in(kind: type[BaseModel], error: ValidationError) -> SettingError:
    problem = error.errors()[0]
    place, given = problem["loc"], problem["input"]
    message = problem["msg"].removeprefix("Input ").removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        mistake = SettingError(unknown_setting(dotted(place), setting_names(kind)))
    elif problem["type"] == "missing":
        mistake = SettingError(f"{dotted(place)} is missing; --help says what it is")
    elif problem["type"] == "value_error" and isinstance(given, dict):  # of a group: it begins with a setting's name
        mistake = SettingError(dotted((*place, message)))
    else:
        mistake = SettingError(f"{dotted(place)}: {given!r} {message}")
    mistake.place = place
    return mistake


def dotted(place: Collection[Any]) -> str:
    return ".".join(map(str, place))


def is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def setting_names(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all settings, those of its groups included."""
    names = []
    for name, field in kind.model_fields.items():
        section = field.annotation
        names += setting_names(section, f"{prefix}{name}.") if is_section(section) else [prefix + name]
    return names


def unknown_setting(name: str, known: Collection[str]) -> str:
    """What is wrong, and which known name is near, if one is: in its last part, and where it names a group in all."""

    def nearness(other: str) -> float:
        a, b = (text.strip("-").replace("_", "-") for text in (name, other))
        last = SequenceMatcher(None, a.rpartition(".")[2], b.rpartition(".")[2]).ratio()
        return (last + SequenceMatcher(None, a, b).ratio()) / 2 if "." in name else last

    nearest = max(known, key=nearness)
    hint = f"did you mean {nearest}?" if nearness(nearest) >= NEAR else "--help lists them all"
    return f"unknown setting {name}; {hint}"
