"""A user's recipe from the command line: trained, gone on with, evaluated, reported; each mistake in it one line."""

import shutil

import pytest
import yaml
from command import CACHE, call, rows, run
from states import same_checkpoint

from dlops_dist.config import load_recipe
from dlops_dist.engine import fit
from dlops_dist.errors import UserError

SMALL = """
from torch import nn
from dlops_dist import CrossEntropyLoss, Embedder, Recipe, Run

class Settings(Run):
    width: int = 8

def recipe(settings, inputs):
    trunk = nn.Sequential(nn.Conv2d(3, settings.width, 3, 2), nn.BatchNorm2d(settings.width), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = Embedder(trunk, settings.width, inputs.num_classes, inputs.image_size)
    return Recipe(model, {"ce": (1.0, CrossEntropyLoss())})
"""


def command(recipe, shards, runs, *arguments):
    data = ["--data.shards", shards, "--data.cache-dir", CACHE, "--global-batch-size", "20", "--optimizer.lr", "0.02"]
    return "train", recipe, *data, "--runs-dir", runs, "--epochs", "2", *arguments


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(SMALL)
    return path


def test_a_recipe_is_trained_gone_on_with_evaluated_and_reported(small, shapes_shards, tmp_path):
    arguments = command(small, shapes_shards, tmp_path, "--local", "--name", "run", "--width", "12")
    code, output = call(*arguments)
    assert code == 0, output
    assert output.splitlines()[-1].startswith("result: small after 2 epochs: test loss ")
    row = rows(tmp_path / "run")[-1]
    code, output = call("evaluate", tmp_path / "run", "--recipe", small)
    assert code == 0, output
    assert f"top1: {row['test/top1']!r}" in output.splitlines()
    code, output = run("evaluate", tmp_path / "run")
    assert (code, len(output.splitlines())) == (2, 1)
    assert f"was trained by the recipe {small}; pass --recipe FILE" in output
    code, output = call("report", tmp_path / "run")
    assert code == 0, output
    assert (tmp_path / "run/report/curves.png").is_file()

    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    max((tmp_path / "run/checkpoints").iterdir()).unlink()
    code, output = call(*arguments)
    assert (code, " from step 12" in output) == (0, True), output
    assert same_checkpoint(*(max((tmp_path / name / "checkpoints").iterdir()) for name in ("run", "whole")))

    small.write_text(SMALL.replace("nn.ReLU()", "nn.GELU()"))
    code, output = call(*arguments)
    assert (code, len(output.splitlines())) == (2, 1), output
    assert "was started with other settings (recipe " in output


def test_a_run_is_named_after_its_recipe_and_what_is_in_it(small, shapes_shards, tmp_path):
    for text in (SMALL, SMALL.replace("nn.ReLU()", "nn.GELU()")):
        small.write_text(text)
        code, output = call(*command(small, shapes_shards, tmp_path / "runs", "--local", "--smoke"))
        assert code == 0, output
    names = sorted(path.name for path in (tmp_path / "runs").iterdir() if not path.name.startswith("."))
    assert len(names) == 2
    assert all(name.startswith("small-") for name in names)
    assert yaml.safe_load((tmp_path / "runs" / names[0] / "config.yaml").read_text())["task"] == str(small)


def test_help_lists_the_settings_of_a_recipe_that_describes_nothing(small):
    code, output = call("train", small, "--help")
    assert (code, "None A setting" in output) == (0, False)
    (line,) = [line for line in output.splitlines() if "--width" in line]
    assert line.split() == ["--width", "INT", "(default:", "8)"]


def test_a_dry_run_tells_the_parameters_of_a_recipe_and_leaves_nothing(small, shapes_shards, tmp_path):
    code, output = call(*command(small, shapes_shards, tmp_path / "runs", "--local", "--width", "12", "--dry-run"))
    assert code == 0, output
    weights = 3 * 12 * 9 + 12 + 2 * 12 + 12 * 10 + 10
    assert f"  parameters: {weights}; values trained, with those of losses: {weights}\n" in output
    assert "\n  width: 12 " in output
    assert list(tmp_path.iterdir()) == [small]


def with_loss(line):
    """The recipe with a loss of its own, whose terms are computed by one line."""
    loss = ["class Wrong(nn.Module):", "    reads, sees = 'logits', 'own'", "    def terms(self, x, labels):"]
    text = "\n".join([*loss, f"        {line}", "", "class Settings"])
    return SMALL.replace("CrossEntropyLoss())", "Wrong())").replace("class Settings", text)


MISTAKES = {
    "not there": (None, ["nowhere.py", "No such file"]),
    "does not compile": ("def recipe(:", ["small.py:1: SyntaxError"]),
    "raises when read": ("import math\nmath.sqrt(-1)", ["small.py:2: ValueError: math domain error"]),
    "no settings": ("def recipe(settings, inputs): ...", ["it has no class Settings"]),
    "no recipe": (SMALL.replace("def recipe", "def recipes"), ["it has no function recipe(settings, inputs)"]),
    "raises": (SMALL.replace("    trunk", "    1 / 0\n    trunk", 1), ["small.py:9: ZeroDivisionError"]),
    "returns nothing": (SMALL.replace("return Recipe", "Recipe"), ["must return a Recipe, not a NoneType"]),
    "no weight": (SMALL.replace("(1.0, CrossEntropyLoss())", "CrossEntropyLoss()"), ["must be (weight, loss)"]),
    "no terms": (SMALL.replace("CrossEntropyLoss())", "nn.CrossEntropyLoss())"), ["losses['ce']", "Whole(function)"]),
    "terms of another kind": (with_loss("return x.sum()"), ["losses['ce']: terms must give Terms(sum, count)"]),
    "terms that raise": (with_loss("1 / 0"), ["small.py:8: ZeroDivisionError"]),
    "another width": (SMALL.replace("Embedder(trunk, settings.width", "Embedder(trunk, 99"), ["(4, 8)", "(4, 99)"]),
    "weights without a gradient": (
        SMALL.replace("nn.Flatten())", "nn.Flatten())\n    trunk[1].more = nn.Linear(2, 2)"),
        ["the model's weights 1.more.weight get no gradient"],
    ),
    "not exact": (SMALL.replace("nn.ReLU()", "nn.RReLU()"), ["module 2 changes with torch's random state"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_recipe_is_one_line_and_starts_nothing(mistake, small, shapes_shards, tmp_path):
    text, words = MISTAKES[mistake]
    if text is None:
        small = tmp_path / "nowhere.py"
    else:
        small.write_text(text)
    code, output = call(*command(small, shapes_shards, tmp_path / "runs", "--local"))
    assert (code, len(output.splitlines())) == (2, 1), output
    assert all(word in output for word in words), output
    assert not (tmp_path / "runs").exists()


def test_a_module_is_a_recipe_by_its_name(small, shapes_shards, tmp_path):
    (tmp_path / "mine").mkdir()
    small.rename(tmp_path / "mine/wide.py")
    code, output = run(*command("mine.wide", shapes_shards, "runs", "--local", "--name", "run"), cwd=tmp_path)
    assert code == 0, output
    assert output.splitlines()[-1].startswith("result: wide after 2 epochs: ")
    code, output = call(*command("mine.narrow", shapes_shards, "runs", "--local"), cwd=tmp_path)
    assert (code, len(output.splitlines())) == (2, 1), output
    assert "unknown recipe 'mine.narrow': choose from q1, q2, or pass the path of a file" in output


def test_settings_of_another_recipe_than_the_named_one_are_refused(small, shapes_shards, tmp_path):
    settings = load_recipe(str(small)).settings_type(data={"shards": str(shapes_shards)}, runs_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"^task: these settings are not of the recipe q1; name the one "):
        fit(settings)
