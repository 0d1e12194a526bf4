"""A sweep under a Ray of its own: search, be killed, go on, fail, report."""

import re
import signal

import psutil
import pytest
import yaml
from command import CACHE, TINY, call, rows, run, start, wait_until
from test_recipe_files import SMALL

SETTINGS = [*TINY, "--data.val-fraction", "0.25", "--name", "sweep", "--num-samples", "2"]


def command(shards, runs, *arguments):
    return "tune", "--data.shards", shards, "--runs-dir", runs, *SETTINGS, *arguments


def tune(shards, runs, *arguments):
    return run(*command(shards, runs, *arguments), timeout_s=280)


def trials(sweep):
    """{the searched settings and the seed of a trial: its rows}."""
    found = {}
    for file in sweep.glob("*/config.yaml"):
        settings = yaml.safe_load(file.read_text())
        point = settings["optimizer"]["lr"], settings["triplet"]["margin"], settings["model"]["width"], settings["seed"]
        found[point] = rows(file.parent) if (file.parent / "metrics.jsonl").exists() else []
    return found


@pytest.mark.slow
def test_smoke_ranks_two_trials_and_is_done_once_where_temporary_files_lie_deep(tmp_path):
    deep = tmp_path / ("job-" + "0" * 80)  # a socket's path has 107 bytes
    code, output = run(
        "tune", "--smoke", cwd=tmp_path, timeout_s=280, env={"TMPDIR": str(deep)}
    )  # 80 s where it is alone
    assert code == 0, output
    assert (deep / "ray").is_dir()
    assert output.splitlines()[-1].startswith("result: q1 triplet: triplet.margin ")
    assert "2 of 2 trials to train, " in output
    (sweep,) = (tmp_path / "runs").glob("tune-q1-triplet-*")
    assert {path.name for path in (sweep / "report").glob("*.png")} == {"parallel.png", "responses.png"}
    assert (sweep / "report/index.html").is_file()

    (sweep / "report/parallel.png").unlink()
    code, again = call("tune", "--smoke", cwd=tmp_path)
    assert (code, "is complete" in again, "Ray" in again) == (0, True, False)
    assert again.splitlines()[-1] == output.splitlines()[-1]
    code, report = call("report", sweep)
    assert code == 0, report
    assert table_of(report) == table_of(output)
    assert (sweep / "report/parallel.png").is_file()

    code, output = call("train", "q1", "--local", "--config", sweep / "best.yaml", "--name", "best", cwd=tmp_path)
    assert code == 0, output
    assert rows(tmp_path / "runs/best") in [rows(trial) for trial in sweep.glob("q1-triplet-*")]


def table_of(output):
    """The ranking as it was printed."""
    return re.findall(r"^│ +\d+ │.*$", output, re.MULTILINE)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_same_figures_and_a_failed_trial_stops_nothing(shapes_shards, tmp_path):
    space = ["--space", "triplet.margin grid 0.5", "optimizer.lr grid 0.02 1e12"]
    arguments = [*space, "--epochs", "8", "--checkpoint-every", "3", "--blocks", "4"]
    sweep = tmp_path / "sweep"
    process = start(*command(shapes_shards, tmp_path, *arguments))
    assert wait_until(lambda: any(2 <= len(epochs) < 8 for epochs in trials(sweep).values()), 200)
    process.kill()
    process.communicate()
    code, output = tune(shapes_shards, tmp_path, *arguments)
    assert code == 0, output
    assert len(re.findall(r" epoch \d+/8: ", output)) <= 6, "it began anew"
    assert "failed: the loss became " in output
    assert {len(epochs) for epochs in trials(sweep).values()} == {8, 0}
    code, output = call("train", "q1", "--local", "--config", sweep / "best.yaml", "--name", "whole", cwd=tmp_path)
    assert code == 0, output
    assert rows(tmp_path / "runs/whole") in trials(sweep).values()


@pytest.mark.slow
def test_a_trial_whose_process_dies_goes_on_and_one_that_needs_too_much_memory_is_recorded(shapes_shards, tmp_path):
    """So wide, one layer's weights are more than the 47 bits of addresses that a process has on any machine."""
    space = ["--space", "model.width grid 8 2500000", "--model.stem", "cifar", "--concurrency", "1"]
    arguments = ["--data.shards", shapes_shards, "--runs-dir", tmp_path, *SETTINGS, *space, "--epochs", "40"]
    process = start("tune", *arguments)
    assert wait_until(lambda: any(trials(tmp_path / "sweep").values()), 120)
    children = psutil.Process(process.pid).children(recursive=True)
    (driver,) = [child for child in children if "ImplicitFunc" in " ".join(child.cmdline())]
    driver.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    died = "its process died, or was killed for memory; it goes on from its last checkpoint"
    assert output.count(died) == 1
    assert sorted(map(len, trials(tmp_path / "sweep").values())) == [0, 40]
    assert "cpu is out of memory: you tried to allocate 225000000000000 bytes; " in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_asha_gives_up_trials_and_a_sweep_that_it_ended_is_complete(shapes_shards, tmp_path):
    space = ["--space", "optimizer.lr grid 0.05 0.0001 0.000001", "triplet.margin grid 0.2"]
    arguments = [*space, "--epochs", "6", "--scheduler", "asha", "--workers", "2", "--blocks", "2", "--loss", "triplet"]
    code, output = tune(shapes_shards, tmp_path, *arguments)
    assert code == 0, output
    assert "3 of 3 trials to train, 1 at a time, each on 2 workers" in output
    assert "given up by the scheduler" in output
    lengths = sorted(len(epochs) for epochs in trials(tmp_path / "sweep").values())
    assert lengths[0] < lengths[-1] == 6
    code, output = call(*command(shapes_shards, tmp_path, *arguments))
    assert (code, "is complete" in output) == (0, True), output


@pytest.mark.slow
def test_optuna_runs_every_seed_of_each_point_and_goes_on_with_more(shapes_shards, tmp_path):
    space = ["--space", "optimizer.lr log-uniform 0.01 0.1", "triplet.margin uniform 0.1 0.9"]
    arguments = [*space, "--epochs", "1", "--search", "optuna", "--seeds", "2", "--wandb", "offline"]
    arguments += ["--num-samples", "1"]
    code, output = tune(shapes_shards, tmp_path, *arguments)
    assert code == 0, output
    before = trials(tmp_path / "sweep")
    assert len({point[:3] for point in before}) == 1
    assert sorted(seed for *_, seed in before) == [0, 1]
    code, output = tune(shapes_shards, tmp_path, *arguments, "--num-samples", "2")
    assert code == 0, output
    assert "2 of 4 trials to train" in output
    after = trials(tmp_path / "sweep")
    assert (len(after), before.items() <= after.items()) == (4, True)
    assert len(list(tmp_path.glob("sweep/*/wandb/offline-run-*-sweep-q1-triplet-*"))) == 4
    assert len(list(tmp_path.glob("sweep/wandb/offline-run-*-sweep-summary"))) == 2


@pytest.mark.slow
def test_q2_is_searched_too(stl_shards, tmp_path):
    arguments = ["tune", "q2", "--data.shards", stl_shards, "--data.cache-dir", CACHE, "--runs-dir", tmp_path]
    arguments += ["--global-batch-size", "20", "--model.layers", "12", "9", "5", "--model.code-layer", "9"]
    arguments += ["--data.val-fraction", "0.25", "--pretrain.epochs", "1", "--epochs", "2", "--num-samples", "2"]
    code, output = run(*arguments, timeout_s=280)
    assert code == 0, output
    assert " epoch 2/2: val top-1 " in output
    assert output.splitlines()[-1].startswith("result: q2 frozen: pretrain.optimizer.lr ")


@pytest.mark.slow
def test_a_users_recipe_is_searched_by_a_figure_of_his_choice(shapes_shards, tmp_path):
    recipe, sweep = tmp_path / "small.py", tmp_path / "runs/sweep"
    recipe.write_text(SMALL)
    command = [
        "tune",
        recipe,
        "--data.shards",
        shapes_shards,
        "--data.cache-dir",
        CACHE,
        "--runs-dir",
        tmp_path / "runs",
    ]
    command += ["--name", "sweep", "--global-batch-size", "20", "--epochs", "2", "--data.val-fraction", "0.25"]
    command += ["--space", "width grid 6 12", "--choose-by", "val/loss", "--scheduler", "asha"]
    code, output = run(*command, timeout_s=280)
    assert code == 0, output
    last = {trial.name: rows(trial)[-1] for trial in sweep.glob("small-*") if len(rows(trial)) == 2}
    best = min(last, key=lambda name: last[name]["val/loss"])
    assert f"{best} epoch 2/2: val loss {last[best]['val/loss']:.4f}" in output
    settings = yaml.safe_load((sweep / "best.yaml").read_text())
    figures = f"val loss {last[best]['val/loss']:.4f}, test loss {last[best]['test/loss']:.4f} (one seed)"
    assert output.splitlines()[-1] == f"result: small: width {settings['width']}: {figures}"
    code, output = run("report", sweep)
    assert (code, len(output.splitlines())) == (2, 1), output
    code, output = call("report", sweep, "--recipe", recipe)
    assert (code, "val loss" in output) == (0, True), output
    arguments = ["--local", "--config", sweep / "best.yaml", "--runs-dir", tmp_path, "--name", "best"]
    code, output = call("train", recipe, *arguments)
    assert code == 0, output
    assert rows(tmp_path / "best") == rows(sweep / best)


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "words"), [
    (["--workers", "99"], ["workers: ", "99"]),
    (["--concurrency", "50", "--workers", "2", "--blocks", "2"], ["concurrency: 50", "--concurrency"]),
])  # fmt: skip
def test_too_small_a_machine_is_one_line(arguments, words, shapes_shards, tmp_path):
    code, output = tune(shapes_shards, tmp_path, *arguments)
    assert code == 2, output
    assert all(word in output.splitlines()[-1] for word in words), output
    assert "Traceback" not in output


def test_a_sweep_of_other_settings_is_refused_by_name_and_a_mistake_leaves_nothing(shapes_shards, tmp_path):
    code, output = call(*command(shapes_shards, tmp_path / "runs", "--space", "global-batch-size grid 20 5000"))
    assert (code, len(output.splitlines())) == (2, 1), output
    assert "5000" in output
    assert not (tmp_path / "runs").exists()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/sweep.yaml").write_text("task: q1\nspace: ['optimizer.lr grid 1']\ndata: {val_fraction: 0.25}")
    code, output = call(*command(shapes_shards, tmp_path))
    assert (code, len(output.splitlines())) == (2, 1), output
    assert "choose another --name" in output
