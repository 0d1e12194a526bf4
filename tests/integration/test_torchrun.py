"""Processes that torchrun starts: as one process, told once, started again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from command import TINY, call, rows, wait_until

SETTINGS = [*TINY, "--blocks", "4", "--epochs", "6", "--checkpoint-every", "4", "--log-every", "1", "--name", "run"]


def torchrun(*arguments, restarts=0):
    """The launcher, under way."""
    command = [Path(sys.executable).parent / "torchrun", "--nproc-per-node", "2", "--max-restarts", restarts]
    command += ["--standalone", "-m", "dlops_dist.train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def of_ours(output):
    """Without what torchrun says of the processes that it started."""
    return [
        line for line in output.splitlines() if line.startswith(("error: ", "failed: ", "run ", "epoch ", "result"))
    ]


@pytest.mark.slow
def test_a_stopped_and_a_killed_process_of_torchrun_change_no_bit_and_each_line_comes_once(shapes_shards, tmp_path):
    arguments = ["q1", "--data.shards", shapes_shards, *SETTINGS]
    checkpoints, steps = tmp_path / "ranks/run/checkpoints", tmp_path / "ranks/run/steps.jsonl"
    with torchrun(*arguments, "--runs-dir", tmp_path / "ranks") as process:
        assert wait_until(lambda: steps.exists() and len(steps.read_text().splitlines()) >= 7, 90)
        process.terminate()  # torchrun tells its processes
        output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert output.count("stopping as soon as the step is saved; once more stops at once") == 1, output
    step = json.loads(steps.read_text().splitlines()[-1])["step"]
    stopped = max(checkpoints.iterdir())
    assert stopped.name == f"step-{step:09d}.pt"

    with torchrun(*arguments, "--runs-dir", tmp_path / "ranks", restarts=2) as process:
        assert wait_until(lambda: max(checkpoints.glob("step-*.pt")) > stopped, 90)
        ranks = psutil.Process(process.pid).children()
        ranks[-1].send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    told = of_ours(output)
    first, second = [line for line in told if line.startswith("run ")]
    assert f" from step {step}" in first
    assert " from step " in second
    assert [line.split("  ")[0] for line in told if line.startswith("epoch ")][-1] == "epoch 6/6"
    assert sum(line.startswith("result: q1 ce after 6 epochs: test loss ") for line in told) == 1
    code, whole = call("train", *arguments, "--local", "--runs-dir", tmp_path / "one")
    assert code == 0, whole
    assert rows(tmp_path / "ranks/run") == rows(tmp_path / "one/run")
    last, expected = max(checkpoints.iterdir()), max((tmp_path / "one/run/checkpoints").iterdir())
    assert (last.name, last.read_bytes()) == (expected.name, expected.read_bytes())

    with torchrun(*arguments, "--runs-dir", tmp_path / "ranks", "--seed", "7") as process:
        output, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    (line,) = of_ours(output)
    assert "seed 0 there, 7 here" in line
