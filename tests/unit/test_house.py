"""The house rules: imports point one way, --help is fast and imports neither torch nor ray."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "dlops_dist"
LAYERS = [
    {"errors"},
    {"files", "sockets", "figures", "events", "signals", "tables"},
    {"config", "command_line", "models", "losses", "optim", "metrics", "data"},
    {"distributed", "draw"},
    {"engine"},
    {"recipes"},
    {"console", "trackers", "smoke"},
    {"sweep"},
    {"preflight", "ray_metrics"},
    {"ray_cluster", "ray_places", "ray_worker", "ray_telling"},
    {"ray_backend"},
    {"ray_tuner", "torchrun"},
    {"train", "dry_run", "evaluate", "report", "verify", "tune", "predict", "embed", "export", "shard", "commands"},
]
"""Each may import from those before it, and from its own."""
PURE = {"models", "losses", "optim", "metrics"}
"""Know nothing of each other, nor of any other part of the package."""


def imported(path):
    """Top-level names within the package, and packages outside of it, that a file imports anywhere."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            first, _, rest = name.partition(".")
            (inside if first == "dlops_dist" else outside).add(rest.split(".")[0] if first == "dlops_dist" else first)
    return inside - {""}, outside


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [p for p in PACKAGE.rglob("*.py") if part_of(p) != "__init__"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    part = part_of(path)
    depth = next(i for i, layer in enumerate(LAYERS) if part in layer)
    allowed = {part}.union(*LAYERS[: depth + (part not in PURE)])
    assert imported(path)[0] <= allowed


def test_no_two_files_need_each_other():
    """Not even in a function."""
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    needed = {}
    for name, path in names.items():
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        found = {part for node in imports for a in node.names for part in (node.module, f"{node.module}.{a.name}")}
        needed[name] = found & names.keys()
    list(TopologicalSorter(needed).static_order())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_knows_the_shipped_recipes_by_name(path):
    if part_of(path) != "recipes":
        texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not texts & {"q1", "q2"}
        assert "recipes" not in imported(path)[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_modules_that_are_named_so_import_ray(path):
    assert ("ray" in imported(path)[1]) == part_of(path).startswith("ray_")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_stay_short(path):
    assert len(path.read_text().splitlines()) <= 300


@pytest.mark.parametrize(
    "module",
    ["train", "train q1", "train q2", "evaluate", "predict", "embed", "export", "report", "verify", "shard",
     "shard index", "tune", "tune q1", "tune q2"],
)  # fmt: skip
def test_help_imports_neither_torch_nor_ray(module):
    name, *task = module.split()
    code = (
        "import sys, runpy, atexit\n"
        "atexit.register(lambda: print('LOADED', [m for m in ('torch', 'ray', 'pyarrow') if m in sys.modules]))\n"
        f"sys.argv = ['x', *{task!r}, '--help']\n"
        f"runpy.run_module('dlops_dist.{name}', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert "LOADED []" in done.stdout
    assert "--" in done.stdout
