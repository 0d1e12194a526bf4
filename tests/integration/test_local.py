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


@pytest.mark.parametrize("loss", ["ce", "triplet", "center"])
def test_a_run_repeats_itself_and_evaluate_repeats_its_figures(loss, shapes_shards, tmp_path):
    arguments = ("--loss", loss, "--epochs", "2", "--name", "run")
    for runs in ("a", "b"):
        code, output = train(shapes_shards, tmp_path / runs, *arguments)
        assert code == 0, output
    first, second = rows(tmp_path / "a/run"), rows(tmp_path / "b/run")
    assert first == second
    assert [row["epoch"] for row in first] == [1, 2]

    code, output = run("evaluate", tmp_path / "a/run")
    assert code == 0, output
    for name in ("loss", "top1", "top5", "nearest_center", "recall_at_1"):
        assert f"{name}: {first[-1]['test/' + name]!r}" in output.splitlines()
    assert output.splitlines()[-1].startswith("result: run at epoch 2, test: loss ")

    code, output = train(shapes_shards, tmp_path / "a", *arguments)
    assert (code, "is complete" in output) == (0, True)
    assert rows(tmp_path / "a/run") == first


def test_a_run_folder_holds_what_it_should_and_its_config_trains_the_same_again(shapes_shards, tmp_path):
    code, output = train(shapes_shards, tmp_path, "--epochs", "1", "--name", "run", "--data.val-fraction", "0.25")
    assert code == 0, output
    folder = tmp_path / "run"
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoints", "config.yaml", "metrics.jsonl"]
    row = json.loads((folder / "metrics.jsonl").read_text())
    expected = {"epoch", "step", "lr", "train/loss", "train/top1", "train/top5", "val/top1", "test/loss", "test/top1"}
    assert expected | {"test/top5", "test/nearest_center", "test/recall_at_1", "test/top1_by_class"} <= row.keys()
    assert len(row["test/top1_by_class"]) == 10
    assert yaml.safe_load((folder / "config.yaml").read_text())["optimizer"]["lr"] == 0.02
    code, output = run("train", "q1", "--local", "--config", folder / "config.yaml", "--name", "again", "--epochs", "1")
    assert code == 0, output
    assert rows(tmp_path / "again") == rows(folder)


@pytest.mark.parametrize("loss", ["triplet", "center"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_to_the_same_bits(loss, how, shapes_shards, tmp_path):
    arguments = ("--loss", loss, "--epochs", "8", "--name", "run", "--checkpoint-every", "3")
    process = start(
        "train", "q1", "--local", "--data.shards", shapes_shards, "--runs-dir", tmp_path / "stopped", *TINY, *arguments
    )
    checkpoints = tmp_path / "stopped/run/checkpoints"
    assert wait_until(lambda: len(list(checkpoints.glob("step-*.pt"))) >= 2)
    process.send_signal(how)
    output, _ = process.communicate(timeout=30)
    assert process.returncode != 0, "it finished before it was stopped"
    assert "Traceback" not in output

    code, output = train(shapes_shards, tmp_path / "stopped", *arguments)
    assert code == 0, output
    assert " from step " in output
    code, output = train(shapes_shards, tmp_path / "whole", *arguments)
    assert code == 0, output
    assert rows(tmp_path / "stopped/run") == rows(tmp_path / "whole/run")
    states = [
        torch.load(tmp_path / runs / "run/checkpoints/step-000000096.pt", weights_only=True)
        for runs in ("stopped", "whole")
    ]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name


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


def test_a_name_with_other_settings_or_data_is_refused(shapes_shards, tmp_path):
    assert train(shapes_shards, tmp_path, "--epochs", "1", "--name", "run")[0] == 0
    before = rows(tmp_path / "run")
    code, output = train(shapes_shards, tmp_path, "--epochs", "1", "--name", "run", "--seed", "7")
    assert code == 2
    assert "seed 0 there, 7 here" in output
    other = tmp_path / "other"
    assert run("shard", "shapes", "--classes", "5", "--out", other)[0] == 0
    code, output = train(other / "shapes", tmp_path, "--epochs", "1", "--name", "run")
    assert code == 2, output
    assert "dataset" in output
    code, output = run("evaluate", tmp_path / "run", "--data.shards", other / "shapes")
    assert (code, len(output.splitlines())) == (2, 1)
    assert "5 classes, the run has 10" in output
    assert rows(tmp_path / "run") == before


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


def test_report_prints_a_table_and_draws_curves(shapes_shards, tmp_path):
    for loss in ("ce", "center"):
        assert train(shapes_shards, tmp_path, "--epochs", "1", "--loss", loss, "--name", loss)[0] == 0
    code, output = run("report", tmp_path / "ce", tmp_path / "center")
    assert code == 0, output
    assert output.count("original study") == 2
    assert (tmp_path / "center/report/curves.png").read_bytes().startswith(b"\x89PNG")
