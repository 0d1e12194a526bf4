"""Settings in a YAML file, and the line that each stands on."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from dlops_dist.errors import UserError


class _Yaml12Loader(yaml.SafeLoader):
    """Only true and false are booleans: `wandb: off` is a word."""


_Yaml12Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml12Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|false)$"), list("tf"))
NAMES = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a file, as they stand there."""
    return parse_yaml(str(path), content_of(path))


def content_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def parse_yaml(name: str, content: bytes) -> dict[str, Any]:
    """The settings in the content of a file of that name. Refuses what is no mapping of names, by file and line."""
    try:
        root = yaml.compose(content, _Yaml12Loader)
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{name}:{_line(root)}: must hold settings as 'name: value'")
        _check_names(name, root)
        return yaml.load(content, _Yaml12Loader)  # type: ignore[no-any-return]
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        what = ", ".join(filter(None, (error.context, error.problem)))
        raise UserError(f"{name}{line}: not valid YAML: {what}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # bytes that are no text, a 13th month, a loop
        raise UserError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None


def line_of(content: bytes, place: Iterable[str | int]) -> int:
    """Where a setting stands in what `parse_yaml` has read, or the group that it is in."""
    node: Any = yaml.compose(content, _Yaml12Loader)
    line = _line(node)
    for part in place:
        match node:
            case yaml.MappingNode():
                pairs = [(key, value) for key, value in node.value if key.value == part]
            case yaml.SequenceNode() if isinstance(part, int):
                pairs = [(node.value[part],) * 2]
            case _:
                pairs = []
        if not pairs:
            break
        key, node = pairs[-1]
        line = _line(key)
    return line


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1  # type: ignore[no-any-return]


def _check_names(file: str, mapping: yaml.MappingNode) -> None:
    for key, value in mapping.value:
        if key.tag not in NAMES:
            what = f"{key.value!r} is not the name of a setting; quote it if it is meant as text"
            raise UserError(f"{file}:{_line(key)}: {what}")
        if isinstance(value, yaml.MappingNode):
            _check_names(file, value)
