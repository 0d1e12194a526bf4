"""Under a real Ray cluster on this machine: train, refuse, submit, be killed."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from command import CACHE, TINY, rows, run, start, wait_until

SETTINGS = [*TINY, "--precision", "float64", "--epochs", "2", "--name", "run"]
RAY = Path(sys.executable).parent / "ray"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Environment in which commands reach a cluster of 3 CPUs that was started for these tests."""
    ports = [free_port() for _ in range(3)]
    token = tmp_path_factory.mktemp("ray") / "token"
    token.write_text("0123456789abcdef" * 4)
    mode = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | mode
    head = subprocess.Popen(
        [RAY, "start", "--head", "--block", "--num-cpus", "3", "--port", str(ports[0]), "--disable-usage-stats",
         "--dashboard-port", str(ports[1]), "--dashboard-agent-listen-port", str(ports[2])],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        assert wait_until(lambda: head.poll() is not None or listens(ports[1]), 90)
        assert head.poll() is None, "ray start ended"
        dashboard = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports[1]}"}
        yield {**mode, **dashboard, "RAY_ADDRESS": f"127.0.0.1:{ports[0]}"}
    finally:
        started = [head, *psutil.Process(head.pid).children(recursive=True)]
        for process in reversed(started):
            process.kill()
        head.wait(timeout=30)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def train(shards, runs, *arguments, **options):
    return run(
        "train", "q1", "--data.shards", shards, "--runs-dir", runs, *SETTINGS, *arguments, timeout_s=180, **options
    )


@pytest.mark.parametrize("loss", ["triplet", pytest.param("center", marks=pytest.mark.slow)])
def test_ray_workers_compute_what_one_process_computes(loss, cluster, shapes_shards, tmp_path):
    arguments = ("--loss", loss, "--optimizer.lr", "0.002")
    code, output = train(shapes_shards, tmp_path / "ray", *arguments, "--workers", "3", env=cluster)
    assert code == 0, output
    assert "3 workers on cpu" in output
    assert output.splitlines()[-1].startswith(f"result: q1 {loss} after 2 epochs: test loss ")
    code, output = train(shapes_shards, tmp_path / "local", *arguments, "--local")
    assert code == 0, output
    for ours, theirs in zip(rows(tmp_path / "ray/run"), rows(tmp_path / "local/run"), strict=True):
        assert ours == {name: pytest.approx(value, rel=1e-6) for name, value in theirs.items()}


@pytest.mark.slow
def test_q2_on_ray_workers_computes_what_one_process_computes(cluster, stl_shards, tmp_path):
    arguments = ["train", "q2", "--data.shards", stl_shards, "--data.cache-dir", CACHE, "--precision", "float64"]
    arguments += ["--name", "run", "--global-batch-size", "22", "--epochs", "2", "--model.layers", "12", "9", "5"]
    arguments += ["--model.code-layer", "9", "--pretrain.epochs", "1", "--pretrain.optimizer.lr", "0.2", "--finetune"]
    code, output = run(*arguments, "--runs-dir", tmp_path / "ray", "--workers", "2", env=cluster, timeout_s=180)
    assert code == 0, output
    assert "2 workers on cpu" in output
    assert output.splitlines()[-1].startswith("result: q2 finetuned after 5 epochs: test loss ")
    code, output = run(*arguments, "--runs-dir", tmp_path / "local", "--local")
    assert code == 0, output
    for ours, theirs in zip(rows(tmp_path / "ray/run"), rows(tmp_path / "local/run"), strict=True):
        exact = ("stage", "test/confusion", "test/top1_by_class")
        assert ours == {n: v if n in exact else pytest.approx(v, rel=1e-6) for n, v in theirs.items()}
    assert (tmp_path / "ray/run/report/confusion.png").is_file()


def test_more_workers_than_the_cluster_has_is_one_line(cluster, shapes_shards, tmp_path):
    code, output = train(shapes_shards, tmp_path, "--workers", "5", env=cluster)
    assert code == 2
    assert output.splitlines()[-1].startswith("error: workers: 5 is more than the 3 CPUs")


def test_no_cluster_at_the_address_is_one_line(shapes_shards, tmp_path):
    code, output = train(shapes_shards, tmp_path, env={"RAY_ADDRESS": f"127.0.0.1:{free_port()}"})
    assert code == 2, output
    assert "Traceback" not in output
    assert output.splitlines()[-1].startswith("error: RAY_ADDRESS=127.0.0.1:")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_with_a_line_and_no_restart(cluster, shapes_shards, tmp_path):
    code, output = train(shapes_shards, tmp_path, "--optimizer.lr", "1e12", "--workers", "2", env=cluster)
    assert code == 1, output
    assert output.splitlines()[-1].startswith("failed: the loss became")
    assert output.count("training and") == 1, "it was started again"


@pytest.mark.slow
def test_a_killed_worker_changes_no_bit_of_the_result(cluster, shapes_shards, tmp_path):
    arguments = ["--loss", "center", "--workers", "2", "--epochs", "12", "--checkpoint-every", "4"]
    arguments += ["--precision", "float32"]
    process = start(
        "train", "q1", "--data.shards", shapes_shards, "--runs-dir", tmp_path / "killed", *SETTINGS, *arguments,
        env=cluster,
    )  # fmt: skip
    metrics = tmp_path / "killed/run/metrics.jsonl"
    assert wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2, 90)
    workers = subprocess.run(["pgrep", "-f", "ray::RayTrainWorker"], capture_output=True, text=True, check=True)
    os.kill(int(workers.stdout.split()[0]), signal.SIGKILL)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert " from step " in output
    code, output = train(shapes_shards, tmp_path / "whole", *arguments, env=cluster)
    assert code == 0, output
    assert rows(tmp_path / "killed/run") == rows(tmp_path / "whole/run")
    last = [
        torch.load(max((tmp_path / runs / "run/checkpoints").iterdir()), weights_only=True)
        for runs in ("killed", "whole")
    ]
    assert all(torch.equal(value, last[1]["model"][name]) for name, value in last[0]["model"].items())
    assert torch.equal(last[0]["loss"]["center.centers"], last[1]["loss"]["center.centers"])


@pytest.mark.slow
def test_a_submitted_job_trains_and_its_exit_code_is_true(cluster, shapes_shards, tmp_path):
    command = [RAY, "job", "submit", "--", sys.executable, "-m", "dlops_dist.train", "q1", "--loss", "center"]
    command += ["--data.shards", shapes_shards, "--runs-dir", tmp_path, "--workers", "2", *SETTINGS]
    environment = {**os.environ, **cluster}
    del environment["RAY_ADDRESS"]
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "result: q1 center after 2 epochs" in done.stdout
    assert len(rows(tmp_path / "run")) == 2
    failing = [*map(str, command), "--seed", "3"]
    done = subprocess.run(failing, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode != 0
    assert "choose another --name" in done.stdout + done.stderr
