"""One process, from the command line: train, stop, go on, evaluate; and every mistake that a user can make."""

import json
import signal

import pytest
import torch
import yaml
from command import TINY, rows, run, start, wait_until


def train(shards, runs, *arguments, **options):
    return run("train", "q1", "--local", "--data.shards", shards, "--runs-dir", runs, *TINY, *arguments, **options)


def test_smoke_needs_nothing_else(tmp_path):
    code, output = run("train", "q1", "--smoke", cwd=tmp_path, timeout_s=60)
    assert code == 0, output
    assert output.splitlines()[-1].startswith("result: q1 ce after 2 epochs: test loss ")
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
    code, output = run("evaluate", runs / loss)
    assert code == 0, output
    for name in ("loss", "top1", "top5", "nearest_center", "recall_at_1"):
        assert f"{name}: {before[-1]['test/' + name]!r}" in output.splitlines()
    assert output.splitlines()[-1].startswith(f"result: {loss} at epoch 2, test: loss ")

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
    code, output = run("train", "q1", "--local", *arguments)
    assert code == 0, output
    assert rows(tmp_path / "again") == rows(folder)


EIGHT_EPOCHS = ("--epochs", "8", "--name", "run", "--checkpoint-every", "3")


@pytest.fixture(scope="module")
def undisturbed(shapes_shards, tmp_path_factory):
    """{loss: a run of eight epochs that nothing stopped}."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for loss in ("triplet", "center"):
        code, output = train(shapes_shards, folder / loss, "--loss", loss, *EIGHT_EPOCHS)
        assert code == 0, output
    return {loss: folder / loss / "run" for loss in ("triplet", "center")}


@pytest.mark.parametrize(
    ("loss", "how"),
    [("triplet", signal.SIGKILL), ("center", signal.SIGKILL), ("triplet", signal.SIGINT), ("center", signal.SIGTERM)],
)
def test_a_stopped_run_goes_on_to_the_same_bits(loss, how, undisturbed, shapes_shards, tmp_path):
    arguments = ("--loss", loss, *EIGHT_EPOCHS)
    process = start("train", "q1", "--local", "--data.shards", shapes_shards, "--runs-dir", tmp_path, *TINY, *arguments)
    checkpoints = tmp_path / "run/checkpoints"
    assert wait_until(lambda: len(list(checkpoints.glob("step-*.pt"))) >= 2)
    process.send_signal(how)
    output, _ = process.communicate(timeout=30)
    assert process.returncode != 0, "it finished before it was stopped"
    assert "Traceback" not in output

    code, output = train(shapes_shards, tmp_path, *arguments)
    assert code == 0, output
    assert " from step " in output
    assert rows(tmp_path / "run") == rows(undisturbed[loss])
    ours, theirs = (
        torch.load(folder / "checkpoints/step-000000096.pt", weights_only=True)["model"]
        for folder in (tmp_path / "run", undisturbed[loss])
    )
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


MISTAKES = {
    "no shards": (["--data.shards", "nowhere"], ["nowhere", "python launch/shard.py"]),
    "not shards": (["--data.shards", "."], ["manifest.json"]),
    "unknown setting": (["--optimizer.rl", "0.1"], ["--optimizer.rl", "--optimizer.lr"]),
    "out of range": (["--optimizer.momentum", "1.5"], ["optimizer.momentum", "1.5", "less than 1"]),
    "not a number": (["--epochs", "many"], ["--epochs", "many"]),
    "not a choice": (["--loss", "cosine"], ["cosine", "triplet"]),
    "batch too large": (["--global-batch-size", "5000"], ["global_batch_size", "5000", "240"]),
    "no P x K": (["--loss", "triplet", "--global-batch-size", "23"], ["data.samples_per_class", "23"]),
    "name with a path": (["--name", "../escape"], ["name", "../escape"]),
    "no config": (["--config", "missing.yaml"], ["missing.yaml"]),
    "wandb without a key": (["--wandb", "online"], ["wandb", "offline"]),
    "runs folder is a file": (["--runs-dir", "/dev/null/runs"], ["/dev/null/runs"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, shapes_shards, tmp_path):
    arguments, words = MISTAKES[mistake]
    environment = {"HOME": str(tmp_path)}
    code, output = train(shapes_shards, tmp_path / "runs", *arguments, cwd=tmp_path, env=environment)
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
    assert run("shard", "shapes", "--classes", "5", "--out", other)[0] == 0
    code, output = train(other / "shapes", runs, *two_epochs("ce"))
    assert code == 2, output
    assert "dataset" in output
    code, output = run("evaluate", runs / "ce", "--data.shards", other / "shapes")
    assert (code, len(output.splitlines())) == (2, 1)
    assert "5 classes, the run has 10" in output
    assert rows(runs / "ce") == before


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


def test_half_a_last_row_is_passed_over_and_a_lost_row_is_named(shapes_shards, tmp_path):
    arguments = ("--epochs", "3", "--name", "run", "--checkpoint-every", "4")
    assert train(shapes_shards, tmp_path, *arguments)[0] == 0
    whole, metrics = rows(tmp_path / "run"), tmp_path / "run/metrics.jsonl"
    checkpoints = sorted((tmp_path / "run/checkpoints").iterdir())
    checkpoints[-1].unlink()  # the machine went down while the last epoch's row was written
    metrics.write_text(metrics.read_text()[:-40])
    code, output = train(shapes_shards, tmp_path, *arguments)
    assert code == 0, output
    assert rows(tmp_path / "run") == whole
    metrics.unlink()
    code, output = train(shapes_shards, tmp_path, *arguments)
    assert (code, "0 of 3 finished epochs" in output) == (1, True)


@pytest.mark.parametrize("content", ["", "[]", "task: q9", "task: [", "task: q1\nlr: 1"])
def test_a_damaged_config_is_one_line(content, tmp_path):
    (tmp_path / "config.yaml").write_text(content)
    code, output = run("evaluate", tmp_path)
    assert (code, len(output.splitlines())) == (2, 1), output


def test_wandb_offline_needs_no_key_and_writes_the_epochs(shapes_shards, tmp_path):
    code, output = train(
        shapes_shards, tmp_path, "--epochs", "2", "--name", "run", "--wandb", "offline", env={"HOME": str(tmp_path)}
    )
    assert code == 0, output
    (log,) = tmp_path.glob("run/wandb/offline-run-*/run-run.wandb")
    assert b"test/top5" in log.read_bytes()


def test_evaluate_names_what_is_not_a_run(tmp_path):
    code, output = run("evaluate", tmp_path)
    assert (code, len(output.splitlines())) == (2, 1)
    assert "config.yaml" in output


def test_report_prints_a_table_and_draws_curves(runs):
    code, output = run("report", runs / "ce", runs / "center")
    assert code == 0, output
    assert output.count("original study") == 2
    assert (runs / "center/report/curves.png").read_bytes().startswith(b"\x89PNG")
