"""Runs the project's commands as its users do, or in this process: a new one takes seconds to import torch."""

import atexit
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from dlops_dist.errors import exit_code_of

# A shell lets its background jobs ignore SIGINT, and they hand that on to what they start: not to commands under test.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[2]
CACHE = tempfile.mkdtemp(prefix="dlops_dist-tests-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
TINY = [
    "--data.cache-dir",
    CACHE,
    "--model.width",
    "8",
    "--model.stem",
    "imagenet",
    "--global-batch-size",
    "20",
    "--optimizer.lr",
    "0.02",
]


def start(*arguments, within=(), **options):
    """A command of the project, under way; its output on one pipe."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "WANDB_"))}
    environment |= {"OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.Popen(
        [*within, sys.executable, "-m", f"dlops_dist.{arguments[0]}", *map(str, arguments[1:])],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        **options,
    )  # fmt: skip


def run(*arguments, timeout_s=120, **options):
    """(exit code, everything printed) of a command."""
    process = start(*arguments, **options)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return process.returncode, output


def call(*arguments, cwd=None, env=None):
    """(exit code, everything printed) of a command, as `run` gives it; in this process, which it leaves as it was."""
    main = importlib.import_module(f"dlops_dist.{arguments[0]}").main
    output, threads = io.TextIOWrapper(io.BytesIO(), "utf-8"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
        patch.setattr(sys, "argv", [arguments[0], *map(str, arguments[1:])])
        for name in [name for name in os.environ if name.startswith(("RAY_", "WANDB_"))]:
            patch.delenv(name)
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        if cwd is not None:
            patch.chdir(cwd)
        try:
            code = exit_code_of(main)
        except SystemExit as end:
            code = end.code
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = True
    output.seek(0)
    return code, output.read()


def lines_of(process):
    """What it prints, as it comes."""
    lines = []

    def read():
        for line in process.stdout:
            lines.append(line.rstrip())

    threading.Thread(target=read, daemon=True).start()
    return lines


def last_step(run_folder):
    """That was taken and logged; of a row of which only a part is written yet, the one before."""
    file = run_folder / "steps.jsonl"
    whole = file.read_text().rpartition("\n")[0].splitlines() if file.exists() else []
    return json.loads(whole[-1])["step"] if whole else 0


def last_checkpoint(run_folder):
    """(name, bytes) of it."""
    file = max((run_folder / "checkpoints").glob("step-*.pt"))
    return file.name, file.read_bytes()


def rows(run_folder):
    """metrics.jsonl, without what may differ between two runs of the same command."""
    lines = (Path(run_folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("_s")} for line in lines]


def wait_until(condition, timeout_s=60, every_s=0.05):
    """Whether the condition came true in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(every_s)
    return False
