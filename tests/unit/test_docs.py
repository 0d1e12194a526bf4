"""README.md and docs/: each command is one that its parser takes, links lead somewhere, the drawing is of today."""

import argparse
import re
import runpy
import shlex
import sys
import tomllib
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from ray.dashboard.modules.job.cli import job_cli_group
from ray.scripts.scripts import cli as ray_cli
from torch.distributed.run import get_args_parser

from dlops_dist import shard, verify
from dlops_dist.command_line import read_command_line, read_settings, read_sweep

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


LINES = [(page, line) for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
COMMANDS = {
    f"{page}: {shlex.join(words)}": words for page, line in LINES if (words := shlex.split(line, comments=True))
}
(MY_RECIPE,) = [code for code in blocks("README.md", "python") if code.startswith("# my.py\n")]


class Taken(BaseException):
    """Arguments were taken, and what would be done with them is left."""


@pytest.fixture
def take(tmp_path, monkeypatch):
    """Lets its parser read a command, in a folder that holds what commands in the docs name, and does nothing else."""
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my.py").write_text(MY_RECIPE)
    monkeypatch.chdir(tmp_path)

    def taken(words):
        with suppress(Taken):
            read(words, monkeypatch)

    return taken


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_command_in_the_docs_is_taken(words, take):
    take(words)


@pytest.mark.parametrize(
    "line",
    [
        "dlops-train q1 --los ce", "dlops-train our.py", "dlops-tune --space lr", "dlops-shard folders", "dlops-try q1",
        "dlops-verify my.py --margins 1", "dlops-evaluate r --fast", "dlops-predict r",
        "python benchmarks/all.py --fast", "pip install .[none]",
        "torchrun --processes 2 -m dlops_dist.train q1", "torchrun -m dlops_dist.train q1 --los ce", "make",
        "ray start --heads", "ray job submit -- python -m dlops_dist.train q1 --los ce", "bash launch/none.sh",
    ],
)  # fmt: skip
def test_a_line_that_is_no_command_is_not_taken(line, take):
    with pytest.raises((Exception, SystemExit)):
        take(shlex.split(line))


def read(words, patch):
    """Raises what a parser raises of a mistake; Taken, or nothing, where there is none."""
    match words:
        case ["export", setting]:
            assert "=" in setting
        case ["pip", "install", *options, what]:
            assert set(options) <= {"--editable"}
            extras = Requirement(f"package{what.removeprefix('.').removeprefix(PROJECT['name'])}").extras
            assert extras <= PROJECT["optional-dependencies"].keys()
        case ["bash", script, *_]:
            assert (ROOT / script).is_file()
        case ["sbatch", script, *arguments]:
            assert (ROOT / script).is_file()
            read(["dlops-train", *arguments], patch)
        case ["torchrun", *arguments]:
            options = get_args_parser().parse_args(arguments)
            assert options.module
            read(["python", "-m", options.training_script, *options.training_script_args], patch)
        case ["ray", "job", "submit", *arguments]:
            context = job_cli_group.get_command(None, "submit").make_context("submit", arguments)
            read(list(context.params["entrypoint"]), patch)
        case ["ray", name, *arguments]:
            ray_cli.get_command(None, name).make_context(name, arguments)
        case ["python", "-m", module, *arguments]:
            read([module.replace("dlops_dist.", "dlops-"), *arguments], patch)
        case ["python", script, *arguments]:
            patch.syspath_prepend(ROOT / Path(script).parent)
            start(lambda: runpy.run_path(str(ROOT / script), run_name="__main__"), arguments, patch)
        case ["dlops-train", recipe, *settings] if not recipe.startswith("-") and "--help" not in settings:
            read_command_line(recipe, settings)
        case ["dlops-tune", *arguments]:
            recipe = [] if not arguments or arguments[0].startswith("-") else arguments[:1]
            read_sweep(*(recipe or ["q1"]), arguments[len(recipe) :])
        case [name, *arguments]:
            assert name in PROJECT["scripts"]
            start(import_module(f"dlops_dist.{name.removeprefix('dlops-')}").main, arguments, patch)


def start(main, arguments, patch):
    """A command that ends as soon as its arguments are taken."""
    parse_args = argparse.ArgumentParser.parse_args

    def taken(self, *given, **options):
        parse_args(self, *given, **options)
        raise Taken

    patch.setattr(argparse.ArgumentParser, "parse_args", taken)
    for name in ("pack_all", "index", "show", "verify"):
        patch.setattr(shard, name, lambda settings: None)
    patch.setattr(verify, "verify_steps", lambda workers, console: None)
    patch.setattr(verify, "verify_recipe", lambda recipe, settings, *_: read_settings(recipe, settings))
    patch.setattr(verify, "verify_bits", lambda recipe, settings, _: [recipe and read_settings(recipe, settings)])
    patch.setattr(sys, "argv", ["command", *arguments])
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise


def test_links_lead_to_files_and_to_every_page():
    found = set()
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            path = (ROOT / page).parent / link
            assert link.startswith("https://") or path.exists(), f"{page}: {link}"
            found.add(path.resolve())
    assert {(ROOT / page).resolve() for page in PAGES} - found == {ROOT / "README.md"}


def test_the_readme_is_one_that_people_read_and_its_recipe_has_ten_lines():
    assert len(PAGES["README.md"].splitlines()) <= 150
    assert len([line for line in MY_RECIPE.splitlines() if line and not line.startswith("#")]) <= 10


def test_the_drawing_is_of_the_imports_that_there_are():
    drawing = runpy.run_path(str(ROOT / "docs/house.py"))["drawing"]()
    assert blocks("docs/architecture.md", "mermaid") == [drawing], "python docs/house.py draws it anew"
