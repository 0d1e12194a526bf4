"""A group of settings that is validated as it is read, and what a mistake in it looks like."""

import difflib
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from dlops_dist.errors import UserError


class Section(BaseModel):
    """A group of settings. Unknown names are refused; values never change after they were read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
    place: ClassVar[str | None] = None
    """Its dotted name among all settings, '' for the whole of them; by default the class's name, lower case."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(_explain(type(self), error)) from None


def unknown_setting(given: str, known: Sequence[str]) -> str:
    name = given.split("=", maxsplit=1)[0]
    last = name.lstrip("-").rpartition(".")[2]
    close = [k for k in known if k.lstrip("-").rpartition(".")[2] == last.replace("_", "-")]
    close = close or difflib.get_close_matches(name.replace("_", "-"), known, n=1, cutoff=0.6)
    hint = f"; did you mean {close[0]}?" if close else "; --help lists them all"
    return f"unknown setting {name}{hint}"


def setting_names(kind: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in kind.model_fields.items():
        section = field.annotation if isinstance(field.annotation, type) else None
        if section is not None and issubclass(section, BaseModel):
            names += setting_names(section, f"{prefix}{name}.")
        else:
            names.append((prefix + name).replace("_", "-"))
    return names


def _explain(kind: type[Section], error: ValidationError) -> str:
    """The first problem in one line: the field, the value, what is allowed."""
    problem = error.errors()[0]
    place = kind.__name__.lower() if kind.place is None else kind.place
    section = place + "." if place else ""
    field = section + ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return unknown_setting(field, [section + name.replace("-", "_") for name in setting_names(kind)])
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{field.rstrip('.')}: {problem['input']!r} {message}" if problem["loc"] else f"{field}{message}"
