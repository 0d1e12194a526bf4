"""A user's recipe from the command line: trained, gone on with, evaluated, reported; each mistake in it one line."""

import shutil

import pytest
import torch
import yaml
from command import CACHE, call, rows, run
from states import same_checkpoint

from dlops_dist.config import load_recipe
from dlops_dist.engine import fit
from dlops_dist.errors import UserError

SMALL = """
from torch import nn, optim
from dlops_dist import CrossEntropyLoss, Embedder, Keyed, Recipe, Run, TripletLoss

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
    assert "Nearest neighbours" in (tmp_path / "run/report/index.html").read_text()

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


def test_a_run_ends_early_and_another_begins_with_its_weights(small, shapes_shards, tmp_path):
    still = ("--local", "--data.val-fraction", "0.3", "--optimizer.lr", "1e-9")
    first = command(small, shapes_shards, tmp_path, *still, "--name", "first", "--epochs", "9", "--patience", "1")
    code, output = call(*first)
    assert code == 0, output
    assert output.splitlines()[-1].startswith(
        "result: small after 2 epochs, best on the held-out part of train after 1"
    )
    assert [row["epoch"] for row in rows(tmp_path / "first")] == [1, 2]
    code, output = call(*first)
    assert (code, "is complete" in output, output.splitlines()[-1][:28]) == (0, True, "result: small after 2 epochs")

    best = state_of(tmp_path / "first", min)["model"]
    doubled = {name: 2 * value for name, value in best.items()}  # as no seed gives them
    torch.save(doubled, tmp_path / "weights.pt")
    for start, expected in (("first", best), ("weights.pt", doubled)):
        begun = command(small, shapes_shards, tmp_path, *still, "--seed", "7", "--name", f"from-{start}")
        begun = *begun, "--init-from", tmp_path / start, "--freeze", "trunk.0", "trunk.1", "--epochs", "1"
        code, output = call(*begun)
        assert code == 0, output
        assert "warning: init_from" not in output
        model = state_of(tmp_path / f"from-{start}", max)["model"]
        for name, value in expected.items():
            frozen = name.startswith("trunk.")
            assert torch.equal(model[name], value) if frozen else torch.allclose(model[name], value, atol=1e-6), name
    (tmp_path / "weights.pt").unlink()
    code, output = call(*begun)
    assert (code, "is complete" in output) == (0, True), "a run that has begun asks for what it began with"


def state_of(run_folder, which):
    return torch.load(which((run_folder / "checkpoints").iterdir()), weights_only=True)


def with_loss(line):
    """The recipe with a loss of its own, whose terms are computed by one line."""
    loss = ["class Wrong(nn.Module):", "    reads, sees = 'logits', 'own'", "    def terms(self, x, labels):"]
    text = "\n".join([*loss, f"        {line}", "", "class Settings"])
    return SMALL.replace("CrossEntropyLoss())", "Wrong())").replace("class Settings", text)


def with_more(argument):
    """The recipe with something besides model and losses."""
    return SMALL.replace("Loss())})", f"Loss())}}, {argument})")


OWN_MODEL = """
class Own(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.conv, self.fc, self.embedding_dim = nn.Conv2d(3, 5, 3), nn.Linear(5, num_classes), width

    def embed(self, images):
        return self.conv(images).mean((2, 3))

def recipe"""
"""A model that no Embedder looked at."""


def with_own_model(width, num_classes="inputs.num_classes"):
    text = SMALL.replace("    return Recipe(model", f"    return Recipe(Own({width}, {num_classes})")
    return text.replace("\ndef recipe", OWN_MODEL)


TRIPLET = SMALL.replace('"ce": (1', '"triplet": (1.0, TripletLoss(0.2)), "ce": (1')
AN_ORDER = "batches=lambda seed, epoch, labels: "
HALF = "lambda named: optim.AdamW([p for name, p in named if not name.startswith('fc.')])"

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
    "embeddings that are NaN": (
        SMALL.replace("nn.ReLU()", "nn.Threshold(9, float('nan'))"),
        ["small.py", "the model gives embeddings that are infinite or NaN"],
    ),
    "embeddings of another shape": (with_own_model(7), ["small.py", "the model gives embeddings (4, 5)", "not (4, 7)"]),
    "logits of another shape": (with_own_model(5, 3), ["small.py", "the model gives logits (4, 3)", "not (4, 10)"]),
    "a model that raises": (
        with_own_model(5).replace("mean((2, 3))", "mean(9)"),
        ["small.py:14: IndexError: Dimension out of range"],
    ),
    "a metric of another length": (
        with_more("metrics={'short': lambda judged: judged.labels[1:]}"),
        ["metrics['short'] must give one number for each of 4 samples", "not (3,)"],
    ),
    "a metric that raises": (with_more("metrics={'own': lambda judged: 1 / 0}"), ["small.py:12: ZeroDivisionError"]),
    "a metric that is none": (with_more("metrics={'own': 3}"), ["metrics['own'] must be a function", "not 3"]),
    "no optimizer": (with_more("optimizer=lambda named: None"), ["optimizer must make a torch.optim.Optimizer"]),
    "an optimizer of some weights": (with_more(f"optimizer={HALF}"), ["optimizer leaves out the weights fc.weight"]),
    "an optimizer that raises": (
        with_more("optimizer=lambda named: optim.AdamW(named, lr=-1)"),
        ["small.py:12: ValueError: Invalid learning"],
    ),
    "an augmentation of another size": (
        with_more("augment=Keyed(lambda x, draws: x[:, 1:], 1)"),
        ["small.py", "augment gave torch.uint8 (4, 31, 32, 3)", "must keep type and size"],
    ),
    "an augmentation that raises": (with_more("augment=lambda image: 1 / 0"), ["small.py:12: ZeroDivisionError"]),
    "batches of another size": (
        with_more(AN_ORDER + "[range(7)]"),
        ["small.py", "batches: each must have global_batch_size 20", "not 7"],
    ),
    "batches out of range": (
        with_more(AN_ORDER + "[range(230, 250)]"),
        ["small.py", "places must be from 0 to 239, not 240"],
    ),
    "batches before the first": (
        with_more(AN_ORDER + "[range(-1, 19)]"),
        ["small.py", "places must be from 0 to 239, not -1"],
    ),
    "batches that are none": (
        with_more(AN_ORDER + "3"),
        ["small.py", "batches must give a list of batches, not a int"],
    ),
    "batches that raise": (with_more(AN_ORDER + "1 / 0"), ["small.py:12: ZeroDivisionError"]),
    "no batches": (with_more(AN_ORDER + "[]"), ["batches: epoch 0 has none"]),
    "mixup of triplets": (TRIPLET, ["the loss triplet takes labels, not parts of them"], "--augment.mixup", "0.2"),
    "cutmix of views": (with_more("views=2"), ["augment.cutmix: several views are not mixed"], "--augment.cutmix", "1"),
    "chosen by nothing": (SMALL, ["choose_by: val/map_at_r: there is no such"], "--choose-by", "val/map_at_r"),
    "chosen by test": (SMALL, ["choose_by", "name a figure of val/"], "--choose-by", "test/top1"),
    "patience for nothing": (SMALL, ["patience: data.val_fraction 0 holds nothing"], "--patience", "2"),
    "nothing to freeze": (SMALL, ["freeze: the model has no part layer9; it has trunk, fc"], "--freeze", "layer9"),
    "everything frozen": (SMALL, ["freeze: nothing of the model is left to train"], "--freeze", "trunk", "fc"),
    "begun nowhere": (SMALL, ["init_from: nowhere: there is no such run or file"], "--init-from", "nowhere"),
    "begun with no weights": (SMALL, ["init_from", "no weights that can be read"], "--init-from", __file__),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_recipe_is_one_line_and_starts_nothing(mistake, small, shapes_shards, tmp_path):
    text, words, *arguments = MISTAKES[mistake]
    if text is None:
        small = tmp_path / "nowhere.py"
    else:
        small.write_text(text)
    code, output = call(*command(small, shapes_shards, tmp_path / "runs", "--local", *arguments))
    assert (code, len(output.splitlines())) == (2, 1), output
    assert all(word in output for word in words), output
    assert not (tmp_path / "runs").exists()


def test_what_a_recipe_raises_while_it_is_trained_is_one_line_with_its_place(small, shapes_shards, tmp_path):
    small.write_text(with_more("metrics={'own': lambda judged: judged.labels if len(judged.labels) < 5 else 1 / 0}"))
    code, output = call(*command(small, shapes_shards, tmp_path, "--local", "--name", "run"))
    assert code == 1
    assert output.splitlines()[-1].startswith("failed: ")
    assert "small.py:12: ZeroDivisionError: division by zero" in output.splitlines()[-1]


@pytest.mark.slow
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
