"""Settings of q2: which change the result, their mistakes in one line, how many epochs they make."""

from pathlib import Path

import pytest
import yaml

from dlops_dist.command_line import read_settings
from dlops_dist.config import MAY_CHANGE, default_name, result_settings
from dlops_dist.engine.run_folder import RunFolder
from dlops_dist.recipes.q2 import Settings as Q2

CONFIGS = Path(__file__).parents[2] / "configs"
CHANGES = {
    "finetune": True, "folds": True, "epochs": 11,
    "model.layers": (512, 128), "model.code_layer": 64, "model.tied": True, "model.norm": "batch",
    "model.dropout": 0.5, "model.standardize": False,
    "pretrain.epochs": 3, "pretrain.joint_epochs": 2, "pretrain.unlabeled": False, "pretrain.corruption": "masking",
    "pretrain.corruption_level": 0.5, "pretrain.codes_gb": 0.0, "pretrain.optimizer.lr": 0.5,
    "pretrain.optimizer.weight_decay": 1e-3, "optimizer.lr": 0.5, "ce.label_smoothing": 0.1,
}  # fmt: skip


def with_setting(name: str, value: object) -> Q2:
    for part in reversed(name.split(".")):
        value = {part: value}
    return Q2(**value)


def test_each_setting_that_changes_the_result_changes_the_default_name():
    names = [default_name("q2", with_setting(name, value), "id") for name, value in CHANGES.items()]
    names.append(default_name("q2", Q2(), "id"))
    assert len(set(names)) == len(names)
    assert names[0].startswith("q2-finetuned-")
    assert names[1].startswith("q2-frozen-folds-")
    assert names[-1].startswith("q2-frozen-")
    sections = ("model.", "pretrain.")
    q2s_own = {name for name in result_settings(Q2()) if name.startswith(sections) and name.count(".") == 1}
    assert q2s_own <= CHANGES.keys()
    assert not CHANGES.keys() & MAY_CHANGE


@pytest.mark.parametrize("name", CHANGES)
def test_the_settings_of_a_run_are_read_back_as_they_were(name, tmp_path):
    settings = with_setting(name, CHANGES[name])
    RunFolder(tmp_path / "run").create("q2", settings)
    assert RunFolder(tmp_path / "run").settings() == ("q2", settings)
    RunFolder(tmp_path / "run").create("q2", settings)


def test_shards_are_stl10s_whatever_a_file_says_of_other_settings(tmp_path):
    (tmp_path / "settings.yaml").write_text("data: {threads: 3}")
    assert Q2().data.shards == "shards/stl10"
    assert read_settings("q2", ["--config", str(tmp_path / "settings.yaml")]).data.shards == "shards/stl10"
    assert read_settings("q2", []).data.shards == "shards/stl10"


def test_arguments_set_what_they_name(tmp_path):
    arguments = ["--model.layers", "64", "32", "--model.code-layer", "32", "--pretrain.optimizer.lr", "0.5", "--folds"]
    settings = read_settings("q2", arguments)
    assert (settings.model.layers, settings.model.code_layer) == ((64, 32), 32)
    assert (settings.pretrain.optimizer.lr, settings.folds) == (0.5, True)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ({"model": {"code_layer": 7}}, ["model.code_layer: 7", "[1024, 1000, 500, 256, 128, 64]"]),
        ({"model": {"layers": (8, 8), "code_layer": 8}}, ["model.code_layer: 8", "once"]),
        ({"model": {"layers": ()}}, ["model.code_layer: 128"]),
        ({"model": {"layers": (128, 0)}}, ["model.layers.1", "0"]),
        ({"model": {"dropout": 1.0}}, ["model.dropout", "1.0"]),
        ({"pretrain": {"optimizer": {"lr": 0}}}, ["pretrain.optimizer.lr: 0"]),
        ({"pretrain": {"optimizer": {"nesterov": True, "momentum": 0}}}, ["pretrain.optimizer.nesterov"]),
        ({"pretrain": {"corruption_level": 1}}, ["pretrain.corruption_level"]),
        ({"pretrain": {"epoch": 3}}, ["pretrain.epoch", "pretrain.epochs"]),
        ({"data": {"shard": "x"}}, ["data.shard", "data.shards"]),
        ({"epochz": 3}, ["unknown setting epochz", "epochs"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_setting(values, shown, user_error):
    with user_error(*shown):
        Q2(**values)


@pytest.mark.parametrize(
    ("values", "num_folds", "epochs"),
    [
        ({}, 10, 6 * 10 + 10),
        ({"pretrain": {"epochs": 3, "joint_epochs": 5}, "epochs": 7}, 0, 6 * 3 + 5 + 7),
        ({"model": {"layers": (9, 8), "code_layer": 8}, "folds": True, "epochs": 2}, 10, 2 * 10 + 10 * 2),
    ],
)
def test_the_epochs_of_all_stages_add_up(values, num_folds, epochs):
    assert Q2(**values).total_epochs(num_folds) == epochs


@pytest.mark.parametrize("name", ["q2", "q2-finetuned"])
def test_the_published_configs_are_q2s_and_train_the_same_again(name, tmp_path):
    settings = read_settings("q2", ["--config", str(CONFIGS / f"{name}.yaml")])
    assert settings.finetune == (name == "q2-finetuned")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump({"task": "q2", **settings.model_dump()}))
    again = read_settings("q2", ["--config", str(tmp_path / "again.yaml")])
    assert result_settings(again) == result_settings(settings)
