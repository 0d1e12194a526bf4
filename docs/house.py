"""Draws the parts of the package, and which of them need which, into docs/architecture.md: `python docs/house.py`."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

PAGE = Path(__file__).parent / "architecture.md"
PACKAGE = PAGE.parents[1] / "dlops_dist"
PLACE = re.compile(r"(?<=```mermaid\n).*?(?=```)", re.DOTALL)


def drawing() -> str:
    """Mermaid text: an arrow from each part to those it imports, but for what a longer way through others says."""
    needs = imports()
    below: dict[str, set[str]] = {}
    for part in TopologicalSorter(needs).static_order():
        below[part] = needs[part].union(*(below[other] for other in needs[part]))
    lines = ["flowchart TD"]
    for part in sorted(needs):
        said = set().union(*(below[other] for other in needs[part]))
        lines += [f"    {part} --> {other}" for other in sorted(needs[part] - said)] or [f"    {part}"]
    return "".join(f"{line}\n" for line in lines)


def imports() -> dict[str, set[str]]:
    """{part of the package, a file or a folder of files: the others that it imports, wherever in its code}"""
    paths = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__"]
    found: dict[str, set[str]] = {part_of(path): set() for path in paths}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE.name:
                names = [f"{node.module}.{alias.name}".split(".")[1] for alias in node.names]
                found[part_of(path)] |= found.keys() & {*names} - {part_of(path)}
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


if __name__ == "__main__":
    PAGE.write_text(PLACE.sub(lambda _: drawing(), PAGE.read_text()))
