"""Weights & Biases' own variables, our settings beside them, and what W&B would refuse."""

import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import wandb

from dlops_dist import draw, report, trackers, train, tune
from dlops_dist.command_line import read_settings
from dlops_dist.config import sweep_type
from dlops_dist.console import Console
from dlops_dist.engine.run_folder import RunFolder
from dlops_dist.errors import UserError
from dlops_dist.events import EpochEnded, Finished, Logged, Started
from dlops_dist.ray_backend import wandb_environment
from dlops_dist.recipes.q1 import Settings as Q1
from dlops_dist.sweep.folder import SweepFolder
from dlops_dist.trackers import LONGEST_NAME, Wandb, check_trackers, fitting, run_id

STARTED = Started("runs/run", {"seed": 0}, {"classes": 10}, 1, 1, 1, 0)


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """No variable of W&B's but those of the test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def begun(monkeypatch):
    """What W&B is asked for, with its own reading of the variables applied."""
    asked = []

    def init(settings, **given):
        read = wandb.Settings()
        read.update_from_env_vars(dict(os.environ))
        read.update_from_settings(settings)
        names = {
            "id": "run_id", "name": "run_name", "group": "run_group", "project": "project", "dir": "root_dir",
            "mode": "mode", "resume": "resume",
        }  # fmt: skip
        for name, value in given.items():
            if value is not None and name != "config":
                setattr(read, names[name], value)
        asked.append(read)
        return SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None, define_metric=lambda *_, **__: None)

    monkeypatch.setattr(wandb, "init", init)
    return asked


def settings_at_wandb(begun, warnings=None, **settings):
    chosen = {"name": "run", "wandb": "offline", "runs_dir": "runs"} | settings
    Wandb(Q1(**chosen), ([] if warnings is None else warnings).append)(STARTED)
    return begun[-1]


def test_by_default_a_run_has_our_project_its_name_and_its_folder(begun, tmp_path):
    read = settings_at_wandb(begun)
    assert (read.project, read.run_name, read.run_id, read.run_group) == ("dlops_dist", "run", "run", None)
    assert (read.root_dir, read.resume, read.mode, read.silent) == ("runs/run", "allow", "offline", True)


VARIABLES = {
    "WANDB_PROJECT": ("project", "theirs"),
    "WANDB_NAME": ("run_name", "theirs: 1/2"),
    "WANDB_ENTITY": ("entity", "team"),
    "WANDB_RUN_GROUP": ("run_group", "sweep: lr/0.1"),
    "WANDB_NOTES": ("run_notes", "a note"),
    "WANDB_DIR": ("root_dir", "/elsewhere"),
    "WANDB_RUN_ID": ("run_id", "theirs"),
    "WANDB_RESUME": ("resume", "must"),
    "WANDB_INIT_TIMEOUT": ("init_timeout", "300"),
}


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_of_wandbs_wins_over_our_default(name, begun, monkeypatch):
    setting, value = VARIABLES[name]
    monkeypatch.setenv(name, value)
    check_trackers(Q1(wandb="offline"))
    assert str(getattr(settings_at_wandb(begun), setting)) in (value, f"{value}.0")


def test_tags_are_a_list_of_words(begun, monkeypatch):
    monkeypatch.setenv("WANDB_TAGS", "a,b c")
    assert settings_at_wandb(begun).run_tags == ("a", "b c")


MODES = {
    "": "off", "online": "online", "offline": "offline", "dryrun": "offline", "disabled": "off", "shared": "online",
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_the_mode_is_ours_where_it_is_given_else_wandbs(mode, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", mode)
    assert read_settings("q1", []).wandb == MODES[mode]
    assert Q1(wandb="offline").wandb == "offline"
    assert read_settings("q1", ["--wandb", "off"]).wandb == "off"
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert read_settings("q1", []).wandb == "off"


def test_a_mode_that_is_none_is_one_line(monkeypatch, user_error):
    monkeypatch.setenv("WANDB_MODE", "on")
    with user_error("WANDB_MODE=on", "offline"):
        read_settings("q1", [])


REFUSED = {
    "WANDB_PROJECT": "lr/0.1", "WANDB_RUN_ID": "a:b", "WANDB_TAGS": "fine," + "x" * 65, "WANDB_INIT_TIMEOUT": "soon",
    "WANDB_API_KEY": " secret",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_wandb_would_not_take_is_refused_before_anything_is_made(name, monkeypatch, user_error):
    monkeypatch.setenv(name, REFUSED[name])
    with user_error(f"{name}: ", "--wandb off"):
        check_trackers(Q1(wandb="offline"))
    check_trackers(Q1(wandb="off"))


@pytest.mark.parametrize("group", ["sweep: lr/0.1", "g" * 400, "Ärger #7?", "a;b,c'", " spaces "])
def test_no_group_loses_the_log(group, begun, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_GROUP", group)
    warnings = []
    read = settings_at_wandb(begun, warnings)
    assert warnings == []
    assert len(read.run_id) <= LONGEST_NAME
    assert read.run_group == (group if len(group) <= LONGEST_NAME else fitting(group))
    assert settings_at_wandb(begun).run_id == read.run_id, "it goes on as the same run"
    assert settings_at_wandb(begun, name="other").run_id != read.run_id


def test_names_that_are_cut_or_cleaned_still_differ():
    assert run_id("sweep", "run") == "sweep-run"
    assert run_id(None, "q1-ce-lr=0.1") == "q1-ce-lr=0.1"
    ids = {run_id(group, "run") for group in ("a/b", "a:b", "a_b", "g" * 300, "g" * 301)}
    assert len(ids) == 5
    assert fitting("name") == "name"
    assert len(fitting("n" * 129)) == LONGEST_NAME
    assert fitting("n" * 129) != fitting("n" * 130)


@pytest.mark.parametrize("given", [None, "mine"])
def test_a_name_that_is_given_wins_over_wandbs_variable(given, monkeypatch, shapes_shards):
    def begun(*_):
        raise UserError("begun")

    for name in ("WANDB_NAME", "WANDB_RUN_GROUP"):
        monkeypatch.setenv(name, "theirs")
    monkeypatch.setattr(RunFolder, "create", begun)
    settings = {"name": given, "runs_dir": "runs", "data": {"shards": str(shapes_shards), "val_fraction": 0.25}}
    with pytest.raises(UserError, match="begun"):
        train.run("q1", Q1(local=True, **settings), Console(quiet=True))
    assert os.environ.get("WANDB_NAME") == (None if given else "theirs")
    monkeypatch.setattr(SweepFolder, "known_trials", begun)
    with pytest.raises(UserError, match="begun"):
        tune.run_sweep("q1", sweep_type(Q1)(**settings))
    assert os.environ["WANDB_RUN_GROUP"] == (given or "theirs")
    assert "WANDB_NAME" not in os.environ, "it would be that of all trials"


def test_workers_find_wandbs_folder_where_the_command_was_run(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_DIR", "logs")
    monkeypatch.setenv("WANDB_NOTES", "a note")
    assert wandb_environment(Q1(wandb="offline")) == {"WANDB_DIR": str(tmp_path / "logs"), "WANDB_NOTES": "a note"}
    assert wandb_environment(Q1(wandb="off")) == {}


@pytest.mark.parametrize("when", ["init", "log", "finish"])
def test_trouble_is_one_warning_and_the_run_goes_on(when, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("broken\npipe")

    calls = dict.fromkeys(("log", "finish", "define_metric", "init"), lambda *_, **__: None) | {when: fail}
    monkeypatch.setattr(wandb, "init", fail if when == "init" else lambda **_: SimpleNamespace(**calls))
    monkeypatch.setattr(wandb, "teardown", lambda: None)
    warnings = []
    listener = Wandb(Q1(name="run", wandb="offline"), warnings.append)
    for event in (STARTED, EpochEnded({"epoch": 1, "step": 1}), EpochEnded({"epoch": 2, "step": 2}), Finished()):
        listener(event)
    assert len(warnings) == 1
    assert warnings[0].startswith("wandb: broken; ")


def test_steps_have_an_axis_of_their_own_and_pictures_are_images(monkeypatch, tmp_path):
    logged, axes = [], []
    run = SimpleNamespace(
        log=lambda figures, step=None: logged.append((step, figures)), finish=lambda: None,
        define_metric=lambda name, step_metric: axes.append((name, step_metric)),
    )  # fmt: skip
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    (tmp_path / "runs/run").mkdir(parents=True)
    draw.image_grid(tmp_path / "runs/run/report/filters.png", np.zeros((1, 4, 4, 3), np.uint8))
    listener = Wandb(Q1(name="run", runs_dir="runs", wandb="offline"), pytest.fail)
    row = {"epoch": 1, "step": 2, "test/loss": 1.0}
    for event in (
        STARTED,
        Logged({"step": 1, "loss": 0.5}),
        EpochEnded({**row, "test/top1_by_class": [1.0]}),
        Finished(),
    ):
        listener(event)
    assert axes == [("step/*", "step/step")]
    assert logged[:2] == [(1, {"step/step": 1, "step/loss": 0.5}), (2, row)]
    assert isinstance(logged[2][1]["filters"], wandb.Image)


def test_report_sends_its_pictures_where_the_run_was_logged(begun, shapes_shards, monkeypatch, tmp_path, capsys):
    logged = []
    monkeypatch.setattr(trackers, "log_pictures", lambda *given: logged.append(given))
    data = {"shards": str(shapes_shards), "reader": "decode"}
    for mode in ("off", "offline", "online"):
        settings = {"name": mode, "runs_dir": str(tmp_path), "wandb": mode, "epochs": 1, "data": data}
        RunFolder(tmp_path / mode).create("q1", Q1(**settings))
        row = {"epoch": 1, "step": 1, "train/loss": 1.0, "train/top1": 0.5, "test/loss": 1.0, "test/top1": 0.5}
        RunFolder(tmp_path / mode).add_row({**row, "test/top5": 0.9, "test/top1_by_class": [0.5]})
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr(sys, "argv", ["report", *(str(tmp_path / mode) for mode in ("off", "offline", "online"))])
    report.main()
    ((mode, folder, _, name),) = logged
    assert (mode, folder, name) == ("offline", tmp_path / "offline", "offline")
    assert [path.name for path in (folder / "report").glob("*.png")] == ["curves.png"]
    assert capsys.readouterr().err.startswith("warning: wandb: online needs a key")


def test_tensorboard_that_is_missing_is_one_line(monkeypatch, user_error):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with user_error("tensorboard", "pip install 'dlops_dist[tensorboard]'"):
        check_trackers(Q1(tensorboard=True, wandb="off"))


def test_tensorboard_holds_each_epoch_and_step_once_also_after_a_stop(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = Q1(name="run", runs_dir=str(tmp_path), tensorboard=True, wandb="off")
    check_trackers(settings)
    (listener,) = trackers.trackers_of(settings, pytest.fail)
    steps = [Logged({"epoch": 1, "step": step, "loss": 1 / step, "share": None}) for step in range(1, 5)]
    ended = [EpochEnded({"epoch": e, "step": 2 * e, "test/top1": e / 2, "test/top1_by_class": [1]}) for e in (1, 2)]
    for event in (STARTED, *steps[:2], ended[0], steps[2]):  # and then it was killed after the checkpoint of step 2
        listener(event)
    listener._writer.close()
    (listener,) = trackers.trackers_of(settings, pytest.fail)
    for event in (replace(STARTED, first_step=2), *steps[2:], ended[1], Finished()):
        listener(event)
    written = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    written.Reload()
    assert [(e.step, e.value) for e in written.Scalars("test/top1")] == [(2, 0.5), (4, 1.0)]
    assert [e.step for e in written.Scalars("step/loss")] == [1, 2, 3, 4]
    assert "step/share" not in written.Tags()["scalars"]


def test_trouble_with_tensorboard_is_one_warning(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "run").write_text("a file, where a folder should be")
    warnings = []
    listener = trackers.TensorBoard(Q1(name="run", runs_dir=str(tmp_path), wandb="off"), warnings.append)
    for event in (STARTED, Logged({"step": 1}), Finished()):
        listener(event)
    assert len(warnings) == 1
    assert warnings[0].startswith("tensorboard: ")
