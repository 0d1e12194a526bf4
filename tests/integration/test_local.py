"""One process, from the command line: train, stop, go on, evaluate; and every mistake that a user can make."""

import json
import re
import shutil
import signal

import pytest
import torch
import yaml
from command import TINY, call, rows, run, start, wait_until
from states import same_checkpoint

from dlops_dist.data.shards import read_manifest
from dlops_dist.engine import fit
from dlops_dist.errors import UserError
from dlops_dist.models.resnet import resnet18
from dlops_dist.recipes.q1 import Settings as Q1


def train(shards, runs, *arguments, by=call, **options):
    return by("train", "q1", "--local", "--data.shards", shards, "--runs-dir", runs, *TINY, *arguments, **options)


def test_smoke_needs_nothing_else(tmp_path):
    """Nor does it load torch's compiler, which takes seconds."""
    code, output = run("train", "q1", "--smoke", cwd=tmp_path, env={"PYTHONPROFILEIMPORTTIME": "1"}, timeout_s=60)
    assert code == 0, output
    printed = [line for line in output.splitlines() if not line.startswith("import time:")]
    assert printed[-1].startswith("result: q1 ce after 2 epochs: test loss ")
    assert "torch.nn" in output
    assert "torch._dynamo" not in output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]


@pytest.fixture(scope="module")
def runs(shapes_shards, tmp_path_factory):
    """Folder of three finished runs, one for each loss, of two epochs. Only to be read, or copied."""
    folder = tmp_path_factory.mktemp("runs")
    for loss in ("ce", "triplet", "center"):
        code, output = train(shapes_shards, folder, *two_epochs(loss))
        assert code == 0, output
    return folder


def two_epochs(loss):
    return "--loss", loss, "--epochs", "2", "--name", loss, "--data.val-fraction", "0.25"


@pytest.mark.parametrize("loss", ["ce", "triplet", "center"])
def test_evaluate_repeats_a_runs_figures_and_a_finished_run_is_left_alone(loss, runs, shapes_shards):
    before = rows(runs / loss)
    assert [row["epoch"] for row in before] == [1, 2]
    best = max(before, key=lambda row: row["val/top1"])
    code, output = call("evaluate", runs / loss)
    assert code == 0, output
    for name in ("loss", "top1", "top5", "nearest_center", "recall_at_1"):
        assert f"{name}: {best['test/' + name]!r}" in output.splitlines()
    assert output.splitlines()[-1].startswith(f"result: {loss} at epoch {best['epoch']}, test: loss ")

    code, output = train(shapes_shards, runs, *two_epochs(loss))
    assert (code, "is complete" in output) == (0, True)
    assert rows(runs / loss) == before


def test_a_run_folder_holds_what_it_should_and_its_config_trains_the_same_again(runs, tmp_path):
    folder = runs / "ce"
    assert sorted(p.name for p in folder.iterdir() if p.name != "report") == [
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
    ]
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    expected = {"epoch", "step", "lr", "train/loss", "train/top1", "train/top5", "val/top1", "test/loss", "test/top1"}
    assert expected | {"test/top5", "test/nearest_center", "test/recall_at_1", "test/top1_by_class"} <= row.keys()
    assert len(row["test/top1_by_class"]) == 10
    assert yaml.safe_load((folder / "config.yaml").read_text())["optimizer"]["lr"] == 0.02
    arguments = ("--config", folder / "config.yaml", "--name", "again", "--runs-dir", tmp_path)
    code, output = call("train", "q1", "--local", *arguments)
    assert code == 0, output
    assert rows(tmp_path / "again") == rows(folder)


LOSSES = {"ce": ("--ema-decay", "0.95", "--flip-test"), "triplet": (), "center": ()}
FIVE_EPOCHS = ("--epochs", "5", "--name", "run", "--checkpoint-every", "3")


@pytest.fixture(scope="module")
def undisturbed(shapes_shards, tmp_path_factory):
    """{loss: a run of five epochs that nothing stopped}."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for loss, more in LOSSES.items():
        code, output = train(shapes_shards, folder / loss, "--loss", loss, *more, *FIVE_EPOCHS)
        assert code == 0, output
    return {loss: folder / loss / "run" for loss in LOSSES}


@pytest.mark.parametrize(
    ("loss", "how"),
    [
        ("triplet", signal.SIGKILL),
        pytest.param("ce", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("center", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bits(loss, how, undisturbed, shapes_shards, tmp_path):
    arguments = ("--loss", loss, *LOSSES[loss], *FIVE_EPOCHS)
    process = start("train", "q1", "--local", "--data.shards", shapes_shards, "--runs-dir", tmp_path, *TINY, *arguments)
    checkpoints = tmp_path / "run/checkpoints"
    assert wait_until(lambda: len(list(checkpoints.glob("step-*.pt"))) >= 2)
    process.send_signal(how)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == (-how if how == signal.SIGKILL else 130), "it finished before it was stopped"
    assert "Traceback" not in output
    assert ("stopping as soon as the step is saved" in output) == (how != signal.SIGKILL)

    code, output = train(shapes_shards, tmp_path, *arguments)
    assert code == 0, output
    assert " from step " in output
    assert rows(tmp_path / "run") == rows(undisturbed[loss])
    last = "checkpoints/step-000000060.pt"
    assert same_checkpoint(tmp_path / "run" / last, undisturbed[loss] / last)


MISTAKES = {
    "no shards": (["--data.shards", "nowhere"], ["nowhere", "python -m dlops_dist.shard"]),
    "not shards": (["--data.shards", "."], ["manifest.json"]),
    "unknown setting": (["--optimizer.rl", "0.1"], ["--optimizer.rl", "--optimizer.lr"]),
    "out of range": (["--optimizer.momentum", "1.5"], ["optimizer.momentum", "1.5", "less than 1"]),
    "not a number": (["--epochs", "many"], ["epochs: 'many'", "integer"]),
    "not a choice": (["--loss", "cosine"], ["cosine", "triplet"]),
    "batch too large": (["--global-batch-size", "5000"], ["global_batch_size", "5000", "240"]),
    "more workers than blocks": (
        ["--no-local", "--workers", "5", "--blocks", "4"],
        ["workers: 5", "4 blocks", "at most 4"],
    ),
    "no P x K": (["--loss", "triplet", "--global-batch-size", "23"], ["data.samples_per_class", "23"]),
    "name with a path": (["--name", "../escape"], ["name", "../escape"]),
    "no config": (["--config", "missing.yaml"], ["missing.yaml"]),
    "wandb without a key": (["--wandb", "online"], ["wandb", "offline"]),
    "runs folder is a file": (["--runs-dir", "/dev/null/runs"], ["/dev/null/runs"]),
}


@pytest.mark.parametrize(("mistake", "by"), [*((mistake, call) for mistake in MISTAKES), ("unknown setting", run)])
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, by, shapes_shards, tmp_path):
    arguments, words = MISTAKES[mistake]
    environment = {"HOME": str(tmp_path)}
    code, output = train(shapes_shards, tmp_path / "runs", *arguments, by=by, cwd=tmp_path, env=environment)
    assert code == 2, output
    assert len(output.splitlines()) == 1
    assert all(word in output for word in words), output
    assert not [path for path in tmp_path.rglob("*") if path.name not in ("shards", ".cache")]


def test_a_loss_that_is_not_finite_ends_the_run_with_a_line(shapes_shards, tmp_path):
    code, output = train(shapes_shards, tmp_path, "--optimizer.lr", "1e12", "--epochs", "2")
    assert code == 1
    assert "the loss became" in output.splitlines()[-1]
    assert "Traceback" not in output


def test_a_name_with_other_settings_or_data_is_refused(runs, shapes_shards, tmp_path):
    before = rows(runs / "ce")
    code, output = train(shapes_shards, runs, *two_epochs("ce"), "--seed", "7")
    assert code == 2
    assert "seed 0 there, 7 here" in output
    other = tmp_path / "other"
    assert call("shard", "shapes", "--classes", "5", "--limit", "50", "--workers", "1", "--out", other)[0] == 0
    code, output = train(other / "shapes", runs, *two_epochs("ce"))
    assert code == 2, output
    assert "dataset" in output
    code, output = call("evaluate", runs / "ce", "--data.shards", other / "shapes")
    assert (code, len(output.splitlines())) == (2, 1)
    assert "5 classes, the run has 10" in output
    assert rows(runs / "ce") == before


@pytest.mark.slow
def test_a_second_process_of_a_run_is_refused(shapes_shards, tmp_path):
    arguments = ("--epochs", "30", "--name", "run")
    first = start("train", "q1", "--local", "--data.shards", shapes_shards, "--runs-dir", tmp_path, *TINY, *arguments)
    try:
        assert wait_until((tmp_path / "run/metrics.jsonl").exists)
        code, output = train(shapes_shards, tmp_path, *arguments)
        assert (code, len(output.splitlines())) == (2, 1)
        assert "another process" in output
    finally:
        first.kill()


def test_a_lost_checkpoint_is_trained_again_and_lost_rows_are_in_the_checkpoint(shapes_shards, tmp_path):
    arguments = ("--epochs", "3", "--name", "run", "--checkpoint-every", "4")
    assert train(shapes_shards, tmp_path, *arguments)[0] == 0
    whole, metrics = rows(tmp_path / "run"), tmp_path / "run/metrics.jsonl"
    checkpoints = sorted((tmp_path / "run/checkpoints").iterdir())
    checkpoints[-1].unlink()  # the machine went down after the last epoch's row was written
    code, output = train(shapes_shards, tmp_path, *arguments)
    assert code == 0, output
    assert rows(tmp_path / "run") == whole
    metrics.unlink()
    code, output = train(shapes_shards, tmp_path, *arguments)
    assert (code, "metrics.jsonl was missing or damaged" in output, "is complete" in output) == (0, True, True)
    assert rows(tmp_path / "run") == whole


EXECUTED = "!!python/object/apply:os.system ['touch touched']"


@pytest.mark.parametrize("content", ["", "[]", "task: q9", "task: [", "task: q1\nlr: 1", EXECUTED, f"task: {EXECUTED}"])
def test_a_damaged_config_is_one_line_and_nothing_of_it_is_executed(content, tmp_path):
    (tmp_path / "config.yaml").write_text(content)
    code, output = call("evaluate", tmp_path, cwd=tmp_path)
    assert (code, len(output.splitlines())) == (2, 1), output
    code, output = call("train", "q1", "--local", "--config", tmp_path / "config.yaml", cwd=tmp_path)
    assert (code, len(output.splitlines())) == (2, 1), output
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_evaluate_names_what_is_not_a_run(tmp_path):
    code, output = call("evaluate", tmp_path)
    assert (code, len(output.splitlines())) == (2, 1)
    assert "config.yaml" in output


def test_report_prints_a_table_and_draws_curves(runs):
    code, output = call("report", runs / "ce", runs / "center")
    assert code == 0, output
    assert "original study" not in output, "it was of other data"
    assert (runs / "center/report/curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_damaged_latest_checkpoint_falls_back_to_the_one_before_and_to_the_same_bits(
    undisturbed, shapes_shards, tmp_path
):
    shutil.copytree(undisturbed["center"], tmp_path / "run")
    latest = max((tmp_path / "run/checkpoints").iterdir())
    latest.write_bytes(latest.read_bytes()[:-5000])
    code, output = train(shapes_shards, tmp_path, "--loss", "center", *FIVE_EPOCHS)
    assert code == 0, output
    assert f"warning: {latest} cannot be read" in output
    assert " from step 57" in output
    assert rows(tmp_path / "run") == rows(undisturbed["center"])
    assert same_checkpoint(latest, undisturbed["center"] / "checkpoints" / latest.name)
    for checkpoint in latest.parent.iterdir():
        checkpoint.write_bytes(b"")
    code, output = train(shapes_shards, tmp_path, "--loss", "center", *FIVE_EPOCHS)
    assert (code, output.splitlines()[-1].split(": ")[0]) == (1, "failed")
    assert "none of the checkpoints can be read; remove the run's folder to train anew" in output


def test_a_run_may_lie_at_a_url(shapes_shards, tmp_path):
    url = f"file://{tmp_path}/bucket"
    arguments = ("--epochs", "2", "--name", "run", "--data.val-fraction", "0.25", "--wandb", "offline")
    arguments += ("--checkpoint-every", "5", "--keep-checkpoints", "3")
    code, output = train(shapes_shards, url, *arguments, cwd=tmp_path)
    assert code == 0, output
    assert list(tmp_path.glob("wandb/offline-run-*-run"))
    best = max(rows(tmp_path / "bucket/run"), key=lambda row: row["val/top1"])
    kept = {int(path.stem.removeprefix("step-")) for path in (tmp_path / "bucket/run/checkpoints").iterdir()}
    assert kept == {10, 15, 18, best["step"]}
    code, output = train(shapes_shards, url, *arguments, cwd=tmp_path)
    assert (code, "is complete" in output) == (0, True)
    code, output = call("evaluate", f"{url}/run")
    assert code == 0, output
    assert f"top1: {best['test/top1']!r}" in output.splitlines()
    code, output = call("report", f"{url}/run")
    assert (code, (tmp_path / "bucket/run/report/curves.png").is_file()) == (0, True)
    code, output = train(shapes_shards, "nowhere://bucket", *arguments)
    assert (code, len(output.splitlines())) == (2, 1)
    assert "nowhere://bucket" in output


def test_checkpoints_of_another_format_are_refused_by_name(undisturbed, shapes_shards, tmp_path):
    shutil.copytree(undisturbed["ce"], tmp_path / "run")
    latest = max((tmp_path / "run/checkpoints").iterdir())
    torch.save(torch.load(latest, weights_only=True) | {"format": 1}, latest)
    code, output = train(shapes_shards, tmp_path, "--loss", "ce", *LOSSES["ce"], *FIVE_EPOCHS)
    assert (code, len(output.splitlines())) == (2, 1), output
    assert "its checkpoints have format 1, this version reads 3; choose another --name" in output


def test_a_disk_without_room_for_checkpoints_is_refused_before_the_first_step(shapes_shards, tmp_path, monkeypatch):
    """Room for as many as it will write, where it would keep more."""
    model, data = {"width": 8, "stem": "imagenet"}, {"shards": str(shapes_shards), "reader": "decode"}
    settings = Q1(local=True, runs_dir=str(tmp_path), name="run", model=model, data=data, global_batch_size=20)
    free = [10**6, 10**7]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, free[0]))
    with pytest.raises(UserError, match=r"run has 0\.00 GB free, its checkpoints need 0\.01 GB; make room"):
        fit(settings)
    assert not (tmp_path / "run/checkpoints").exists()
    free.pop(0)
    fit(settings.model_copy(update={"name": "few", "epochs": 1, "keep_checkpoints": 99}))


def test_local_wins_over_the_workers_of_a_file_and_not_over_those_of_the_command_line(shapes_shards, tmp_path):
    file = tmp_path / "four.yaml"
    file.write_text("workers: 4\nepochs: 1\n")
    arguments = ("--config", file, "--name", "run")
    code, output = train(shapes_shards, tmp_path, *arguments)
    assert (code, "1 worker on cpu" in output) == (0, True), output
    code, output = train(shapes_shards, tmp_path, *arguments, "--workers", "4")
    assert (code, output) == (2, "error: workers: 4 processes need Ray; leave out --local\n")


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_tells_what_would_be_run_and_leaves_nothing(shapes_shards, tmp_path):
    (tmp_path / "my.yaml").write_text("loss: triplet\nseed: 3\n")
    before = files(tmp_path)
    arguments = ("--config", tmp_path / "my.yaml", "--no-local", "--workers", "2", "--blocks", "2", "--name", "run")
    code, output = train(shapes_shards, tmp_path / "runs", *arguments, "--dry-run")
    assert code == 0, output
    lines = {line.split()[0]: line for line in output.splitlines()}
    for name, value, origin in (
        ("seed", 3, tmp_path / "my.yaml"), ("workers", 2, "command line"), ("epochs", 10, "default"),
        ("model.width", 8, "command line"), ("name", "run", "command line"), ("data.drop_last", True, "default"),
    ):  # fmt: skip
        assert lines[f"{name}:"].split(maxsplit=2)[1:] == [str(value), f"({origin})"]
    manifest = read_manifest(shapes_shards)
    assert lines["data:"] == f"data: shapes, id {manifest.id[:12]}, 10 classes, 32x32: 240 train, 60 test"
    assert lines["steps:"] == "steps: 12 an epoch, 120 in 10 epochs"
    parameters = sum(p.numel() for p in resnet18(10, "imagenet", 8).parameters())
    assert lines["parameters:"].split()[1] == f"{parameters:,};"
    assert f" {4 * (parameters + 2 * 20 * 64):,} bytes a step, 4 x (" in lines["exchange:"]
    assert f" {4 * 3 * parameters / 1e6:.1f} MB in each worker\n" in output
    assert lines["run:"] == f"run: {tmp_path}/runs/run would begin"
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "exchanged"),
    [
        (("--workers", "1"), "0 bytes: there is one worker"),
        (("--local",), "0 bytes: there is one worker"),
        (("--loss", "center"), f"{4 * (177362 + 10 * 64):,} bytes a step, .*; 0 where there is one worker"),
        (("--precision", "float64"), f"{8 * 177362:,} bytes a step, .*"),
    ],
)
def test_what_a_step_exchanges(arguments, exchanged, shapes_shards, tmp_path):
    code, output = train(shapes_shards, tmp_path, "--no-local", *arguments, "--dry-run")
    assert code == 0, output
    assert re.search(f"^  exchange: {exchanged}$", output, re.MULTILINE), output


def test_a_dry_run_says_how_far_the_run_has_come(runs, shapes_shards, tmp_path):
    code, output = train(shapes_shards, runs, *two_epochs("ce"), "--dry-run")
    assert (code, output.splitlines()[-1]) == (0, f"run: {runs}/ce is complete")
    code, output = train(shapes_shards, runs, *two_epochs("ce"), "--seed", "7", "--dry-run")
    assert (code, len(output.splitlines())) == (2, 1), output
    assert "seed 0 there, 7 here" in output
    shutil.copytree(runs / "ce", tmp_path / "ce")
    max((tmp_path / "ce/checkpoints").iterdir()).unlink()
    before = files(tmp_path)
    code, output = train(shapes_shards, tmp_path, *two_epochs("ce"), "--dry-run")
    assert (code, output.splitlines()[-1]) == (0, f"run: {tmp_path}/ce would go on from step 9")
    assert files(tmp_path) == before


def test_a_dry_run_of_generated_images_tells_each_stage_and_leaves_nothing(tmp_path):
    code, output = call("train", "q2", "--smoke", "--dry-run", cwd=tmp_path)
    assert code == 0, output
    assert f"\n  data.shards: {tmp_path}/runs/.smoke-shapes-stl10  (--smoke)\n" in output
    assert "400 train, 100 test, 100 unlabeled\n" in output
    assert "\nlayer 2: 12 an epoch, 24 in 2 epochs\n" in output
    assert f"values trained, with those of losses: {64 * 48 * 2 + 64 + 48:,}\n" in output
    assert "\nin all: 124 steps, 11 epochs\n" in output
    assert not list(tmp_path.iterdir())
