"""What people do to the folders of runs: move them, lose a part of them, ask for more epochs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from states import same_checkpoint

from dlops_dist.config import result_settings
from dlops_dist.data.shards import read_manifest
from dlops_dist.engine import fit, prepare
from dlops_dist.engine.rows import best_row
from dlops_dist.engine.run_folder import RunFolder
from dlops_dist.errors import RunError
from dlops_dist.evaluate import evaluate_run
from dlops_dist.events import Started, Warned
from dlops_dist.recipes.q1 import Settings as Q1
from dlops_dist.recipes.q2 import Settings as Q2
from dlops_dist.report.printing import Printed
from dlops_dist.report.runs import load
from dlops_dist.report.writing import write_run
from dlops_dist.sweep.folder import SweepFolder

EPOCHS, STEPS = 4, 6
"""Of a whole run, and of each epoch."""


@pytest.fixture(autouse=True)
def one_thread():
    """Sums are rounded alike, however many threads another test has left."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def settings_of(shapes_shards, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def settings(runs, name="run", **changes):
        data = {"shards": str(shapes_shards), "cache_dir": str(cache), "val_fraction": 0.25}
        values = {
            "local": True, "runs_dir": str(runs), "name": name, "epochs": EPOCHS, "global_batch_size": 30,
            "model": {"width": 8, "stem": "imagenet"}, "data": data, "optimizer": {"lr": 0.02}, "checkpoint_every": 4,
        }  # fmt: skip
        return Q1(**values | changes)

    return settings


def stopped_after(epochs, steps):
    """Asks a run to stop: a run asks before each epoch, and after each step."""
    asked = iter(range(10**6))
    return lambda: next(asked) >= epochs * (1 + STEPS) + steps


@pytest.fixture(scope="module")
def whole(settings_of, tmp_path_factory):
    """A run of four epochs that nothing stopped."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    fit(settings_of(folder))
    return folder / "run"


@pytest.fixture(scope="module")
def left(settings_of, tmp_path_factory):
    """The same run, stopped in its third epoch. Only to be copied."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("left")
    with pytest.raises(KeyboardInterrupt):
        fit(settings_of(folder), stop=stopped_after(2, 3))
    assert len(rows_of(folder / "run")) == 2
    return folder / "run"


def rows_of(run):
    lines = (run / "metrics.jsonl").read_bytes().decode().split("\n")
    assert lines.pop() == ""
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("_s")} for line in lines]


def go_on(settings):
    """Train to the end; what was told."""
    told = []
    fit(settings, listeners=[told.append])
    return told


def warnings_in(told):
    return [event.text for event in told if isinstance(event, Warned)]


def assert_same(run, whole):
    assert rows_of(run) == rows_of(whole)
    last = sorted((whole / "checkpoints").iterdir())[-1].name
    assert same_checkpoint(run / "checkpoints" / last, whole / "checkpoints" / last)


def test_a_moved_and_renamed_run_goes_on_to_the_same_bits_and_knows_its_place(left, whole, settings_of, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.move(shutil.copytree(left, tmp_path / "runs/a"), tmp_path / "elsewhere/b")
    told = go_on(settings_of(tmp_path / "elsewhere", "b"))
    moved = tmp_path / "elsewhere/b"
    assert [event.first_step for event in told if isinstance(event, Started)] == [2 * STEPS + 3]
    assert not warnings_in(told)
    assert_same(moved, whole)
    config = yaml.safe_load((moved / "config.yaml").read_text())
    assert (config["name"], config["runs_dir"]) == ("b", str(tmp_path / "elsewhere"))
    assert str(tmp_path / "runs") not in (moved / "config.yaml").read_text()
    assert not (tmp_path / "runs/a").exists()


def test_a_finished_run_that_was_moved_is_complete_where_it_is(whole, settings_of, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "b")
    settings = prepare("q1", settings_of(tmp_path, "b"))
    folder = RunFolder.of(settings)
    folder.create("q1", settings)
    row = folder.finished_row(settings, read_manifest(tmp_path / settings.data.shards))
    assert row["epoch"] == EPOCHS
    assert folder.settings() == ("q1", settings)
    best = best_row(rows_of(whole), "val/top1")
    figures, epoch = evaluate_run(str(tmp_path / "b"))
    assert (figures["loss"], epoch) == (best["test/loss"], best["epoch"])
    monkeypatch.chdir(tmp_path / "b")
    assert load(".").name == "b"
    write_run(".", Printed())
    assert (tmp_path / "b/report/curves.png").is_file()


def test_other_settings_or_data_leave_a_runs_config_as_it_was(whole, settings_of, stl_shards, tmp_path, user_error):
    shutil.copytree(whole, tmp_path / "run")
    before = (tmp_path / "run/config.yaml").read_bytes()
    with user_error("seed 0 there, 7 here"):
        fit(settings_of(tmp_path, seed=7))
    other = {"shards": str(stl_shards), "val_fraction": 0.25}
    with user_error("was trained on dataset"):
        fit(settings_of(tmp_path, data=other))
    assert (tmp_path / "run/config.yaml").read_bytes() == before


def test_a_moved_sweeps_trials_say_where_they_lie_now(whole, settings_of, tmp_path):
    shutil.copytree(whole, tmp_path / "moved/trial")
    settings = prepare("q1", settings_of(tmp_path / "moved", "trial"))
    RunFolder.of(settings).create("q1", settings)
    (tmp_path / "moved/sweep.yaml").write_text("task: q1\nspace: [optimizer.lr grid 0.02]\n")
    sweep = SweepFolder.open(tmp_path / "moved")
    assert sweep.is_over(settings)
    assert (sweep.trial("trial").finished, sweep.trial("trial").point) == (True, {"optimizer.lr": 0.02})
    assert RunFolder(tmp_path / "moved/trial").settings()[1].runs_dir == str(tmp_path / "moved")


@pytest.mark.parametrize("how", ["removed", "empty", "another kind of file"])
def test_rows_without_a_checkpoint_are_not_trained_again_unasked(how, left, settings_of, tmp_path, user_error):
    run = shutil.copytree(left, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    if how != "removed":
        (run / "checkpoints").mkdir()
    if how == "another kind of file":
        (run / "checkpoints/step-best.pt").write_bytes(b"mine")
    before = (run / "metrics.jsonl").read_bytes()
    with user_error("rows of 2 epochs", "no checkpoint", "remove the run's folder", "another --name"):
        fit(settings_of(tmp_path))
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_single_row_may_have_waited_for_its_checkpoint_and_is_trained_again_with_a_line(whole, settings_of, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    first, *_ = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(first)
    (warning,) = warnings_in(go_on(settings_of(tmp_path)))
    assert "its last 1 rows are in no checkpoint" in warning
    assert_same(run, whole)


def test_lost_checkpoints_of_the_last_epochs_are_said_before_they_are_trained_again(whole, settings_of, tmp_path):
    settings = settings_of(tmp_path, keep_checkpoints=99)
    fit(settings)
    for path in (tmp_path / "run/checkpoints").iterdir():
        if path.name > f"step-{STEPS:09d}.pt":
            path.unlink()
    (warning,) = warnings_in(go_on(settings))
    assert "its last 3 rows are in no checkpoint" in warning
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("content", [None, b"", b"task: [", b"task: q1\nepochs: many\n"])
def test_a_lost_config_is_written_again_from_the_command_if_the_checkpoint_agrees(
    content, left, whole, settings_of, tmp_path, user_error
):
    run = shutil.copytree(left, tmp_path / "run")
    (run / "config.yaml").unlink()
    if content is not None:
        (run / "config.yaml").write_bytes(content)
    else:
        with user_error("no config.yaml", "the command that trained it writes it again"):
            evaluate_run(str(run))
    with user_error("seed 0 there, 7 here"):
        fit(settings_of(tmp_path, seed=7))
    go_on(settings_of(tmp_path))
    assert_same(run, whole)
    assert RunFolder(run).settings() == ("q1", prepare("q1", settings_of(tmp_path)))


def test_rows_without_config_and_checkpoint_are_refused(left, settings_of, tmp_path, user_error):
    (tmp_path / "run").mkdir()
    shutil.copy(left / "metrics.jsonl", tmp_path / "run")
    with user_error("no checkpoint to go on from", "remove the run's folder"):
        fit(settings_of(tmp_path))


def test_a_best_checkpoint_that_is_lost_is_said_and_the_latest_evaluated(whole, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "run")
    rows = rows_of(run)
    step = max(row["step"] for row in rows)
    path = run / f"checkpoints/step-{step:09d}.pt"
    state = torch.load(path, weights_only=True)
    rows[0]["val/top1"] = 2.0  # the first epoch was the best
    torch.save(state | {"rows": "".join(json.dumps(row) + "\n" for row in rows)}, path)
    _, epoch = evaluate_run(str(run))
    assert epoch == EPOCHS
    assert "best epoch, 1: the latest is taken in its place" in capsys.readouterr().out


def lines(text):
    return text.splitlines(keepends=True)


DAMAGED = {
    "half a last line": lambda text: text + b'{"epoch": 3, "st',
    "garbage in the middle": lambda text: lines(text)[0] + b"\x00\xff{{\n" + lines(text)[1],
    "not a row": lambda text: b"3\n" + text,
    "empty": lambda text: b"",
    "CRLF": lambda text: text.replace(b"\n", b"\r\n"),
    "missing": lambda text: None,
    "a row fewer": lambda text: lines(text)[0],
    "later epochs": lambda text: text + lines(text)[1].replace(b'"epoch": 2', b'"epoch": 3'),
    "other figures": lambda text: text.replace(b'"train/loss": ', b'"train/loss": 1'),
}


@pytest.fixture(scope="module")
def damaged(left):
    def damage(run, how):
        shutil.copytree(left, run)
        content = DAMAGED[how]((run / "metrics.jsonl").read_bytes())
        (run / "metrics.jsonl").unlink()
        if content is not None:
            (run / "metrics.jsonl").write_bytes(content)
        return run

    return damage


@pytest.mark.parametrize("how", DAMAGED)
def test_whatever_befell_the_rows_a_resumed_run_has_those_of_an_undisturbed_one(
    how, damaged, whole, settings_of, tmp_path
):
    run = damaged(tmp_path / "run", how)
    (warning,) = warnings_in(go_on(settings_of(tmp_path)))
    assert str(run / "metrics.jsonl") in warning
    assert_same(run, whole)


@pytest.mark.parametrize("how", ["half a last line", "garbage in the middle", "not a row", "empty", "missing"])
def test_damaged_rows_are_read_from_the_checkpoint(how, damaged, whole, tmp_path):
    run = damaged(tmp_path / "run", how)
    read = [{k: v for k, v in row.items() if not k.endswith("_s")} for row in RunFolder(run).rows()]
    assert read == rows_of(whole)[:2]
    assert len(load(str(run)).rows) == 2
    shutil.rmtree(run / "checkpoints")
    if how in ("empty", "missing"):
        assert RunFolder(run).rows() == []
    else:
        with pytest.raises(RunError, match=r"metrics\.jsonl: line \d is damaged, and no checkpoint holds its rows"):
            RunFolder(run).rows()


def test_damaged_rows_of_a_finished_run_are_written_again(whole, settings_of, tmp_path):
    run, told = shutil.copytree(whole, tmp_path / "run"), []
    (run / "metrics.jsonl").write_bytes(b"")
    settings = prepare("q1", settings_of(tmp_path))
    folder = RunFolder.of(settings)
    folder.create("q1", settings)
    assert folder.finished_row(settings, read_manifest(run / settings.data.shards), told.append)["epoch"] == EPOCHS
    assert rows_of(run) == rows_of(whole)
    assert len(told) == 1


CONSTANT = {"lr": 0.02, "schedule": "constant", "warmup_epochs": 0.5}


@pytest.mark.parametrize(("schedule", "begun"), [("constant", "unfinished"), ("step", "finished")])
def test_two_epochs_and_two_more_are_four_where_no_rate_depends_on_their_number(
    schedule, begun, settings_of, tmp_path, user_error
):
    optimizer = CONSTANT | {"schedule": schedule, "step_epochs": 1}
    fit(settings_of(tmp_path / "at once", optimizer=optimizer))
    short = settings_of(tmp_path, optimizer=optimizer, epochs=2)
    if begun == "finished":
        fit(short)
    else:
        with pytest.raises(KeyboardInterrupt):
            fit(short, stop=stopped_after(1, 2))
    fit(settings_of(tmp_path, optimizer=optimizer))
    assert_same(tmp_path / "run", tmp_path / "at once/run")
    assert RunFolder(tmp_path / "run").settings()[1].epochs == EPOCHS
    assert evaluate_run(str(tmp_path / "run"))[0] == evaluate_run(str(tmp_path / "at once/run"))[0]
    with user_error("epochs 4 there, 2 here", "more may follow, not fewer"):
        fit(short)


REFUSED = {
    "cosine": ({"schedule": "cosine"}, ["epochs 4 there, 8 here", "schedule cosine", "under constant or step"]),
    "one-cycle": ({"schedule": "one-cycle"}, ["epochs 4 there, 8 here", "schedule one-cycle"]),
    "warm-up": (CONSTANT | {"warmup_epochs": 2.0}, ["epochs 4 there, 8 here", "optimizer.warmup_epochs 2.0"]),
}


@pytest.mark.parametrize("begun", ["finished", "unfinished"])
@pytest.mark.parametrize("kind", REFUSED)
def test_other_epochs_are_refused_where_the_rates_depend_on_them(kind, begun, settings_of, tmp_path, user_error):
    optimizer, words = REFUSED[kind]
    values = {"optimizer": {"lr": 0.02} | optimizer, "checkpoint_every": None}
    settings = prepare("q1", settings_of(tmp_path, **values))
    folder = RunFolder.of(settings)
    folder.create("q1", settings)
    position = {"step": 1, "epoch": 4.0 if begun == "finished" else 0.5}
    folder.save(settings, position | {"dataset_id": read_manifest(tmp_path / settings.data.shards).id})
    folder.checkpoints.wait()
    with user_error(*words, "another --name"):
        fit(settings_of(tmp_path, epochs=8, **values))


def test_more_epochs_of_a_classifier_may_follow_but_not_of_what_later_stages_begin_from(tmp_path, user_error):
    def refused(before, after):
        RunFolder(tmp_path / "run")._refuse_other_settings(dict(result_settings(Q2(**before))), Q2(**after))

    constant = {"optimizer": CONSTANT}
    refused(constant, constant | {"epochs": 20})
    with user_error("one fold begins where another ends"):
        refused(constant | {"folds": True}, constant | {"folds": True, "epochs": 20})
    with user_error("pretrain.epochs 10 there, 20 here"):
        refused(constant, constant | {"pretrain": {"epochs": 20}})
    with user_error("epochs 10 there, 20 here", "seed 0 there, 1 here"):
        refused(constant, constant | {"epochs": 20, "seed": 1})


def test_settings_of_a_loss_that_is_not_the_runs_may_differ(left, whole, settings_of, tmp_path, user_error):
    shutil.copytree(left, tmp_path / "run")
    go_on(settings_of(tmp_path, triplet={"margin": 0.9}))
    assert_same(tmp_path / "run", whole)
    with user_error("ce.label_smoothing 0.0 there, 0.1 here"):
        go_on(settings_of(tmp_path, ce={"label_smoothing": 0.1}))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_a_full_disk_ends_a_run_in_one_line(tmp_path):
    """An error of the run's own: Ray's workers are not started again for it."""
    run = RunFolder(tmp_path)
    for file, partial, write in (
        ("steps.jsonl", "steps.jsonl", lambda: run.add_steps([{"step": 1}])),
        ("metrics.jsonl", ".metrics.jsonl.partial", lambda: run.add_row({"step": 1})),
    ):
        (tmp_path / partial).symlink_to("/dev/full")
        with pytest.raises(RunError, match=rf"{tmp_path}/{file}: No space left on device; mend that, then the same"):
            write()


def test_the_gallery_is_of_the_result_which_may_be_an_earlier_epochs(settings_of, tmp_path):
    fit(settings_of(tmp_path, epochs=3, choose_by="val/recall_at_1"))
    rows = RunFolder(tmp_path / "run").rows()
    best = best_row(rows, "val/recall_at_1")
    gallery = load(str(tmp_path / "run")).gallery
    assert best["epoch"] < 3
    assert best["test/top1"] != rows[-1]["test/top1"]
    assert (gallery.labels == gallery.predicted).mean() == pytest.approx(best["test/top1"])
    by_class = [(gallery.predicted == c)[gallery.labels == c].mean() for c in range(10)]
    assert by_class == pytest.approx(best["test/top1_by_class"])
