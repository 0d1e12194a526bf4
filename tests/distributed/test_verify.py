"""The command that shows the promise on the user's own machine."""

import os
import re
import subprocess
import sys

import pytest
from kept_ranks import on_ranks

from dlops_dist import verify
from dlops_dist.distributed import ranks
from dlops_dist.engine import hashes
from dlops_dist.engine.usual import measure
from dlops_dist.errors import RunError, UserError


@pytest.fixture(scope="module")
def measured():
    """What each rank of one and of two measured."""
    return {number: on_ranks(measure, number) for number in (1, 2)}


@pytest.fixture
def verified(measured, monkeypatch):
    """Runs the command for two workers, with what was measured."""
    monkeypatch.setattr(ranks, "run_ranks", lambda function, number, timeout_s: measured[number])
    monkeypatch.setattr(sys, "argv", ["verify", "--workers", "2"])
    hash_few(monkeypatch)
    return verify.main


def hash_few(monkeypatch):
    """On ranks that are kept."""
    monkeypatch.setenv("COLUMNS", "200")
    for name, value in {"run_ranks": on_ranks, "WORKERS": (1, 2), "MOVED": (2, 1), "STEPS": 2}.items():
        monkeypatch.setattr(hashes, name, value)


@pytest.mark.slow
def test_ours_agree_and_the_usual_formulations_do_not(verified, capsys):
    verified()
    output = capsys.readouterr().out
    assert output.splitlines()[-1] == "result: 2 workers compute what one computes"
    rows = re.findall(r"[│|] (\w[^│|]*?) +[│|] +(0|\de[+-]\d\d) [│|]", output)
    ours = [float(error) for how, error in rows if how == "ours"]
    usual = [float(error) for how, error in rows if how != "ours"]
    assert len(ours) == 8
    assert max(ours) < 1e-6
    assert len(usual) == 8
    assert min(usual) > 1e-2
    found = [
        re.findall(r"\b[0-9a-f]{12}\b", line) for line in output.splitlines() if "float32" in line or "bf16" in line
    ]
    assert len(found) == 6
    for one, two, moved, ddp_one, ddp_two in found:
        assert one == two == moved != ddp_one != ddp_two


def test_other_bits_are_a_failure(monkeypatch):
    def ours(cases, tell):
        return {who: [hashes.Hashed(who, b"", None)] * len(cases) for who in ("1 worker", "2 workers")}

    monkeypatch.setattr(sys, "argv", ["verify", "--bits"])
    monkeypatch.setattr(hashes, "ours", ours)
    monkeypatch.setattr(hashes, "under_ddp", lambda cases, tell: [["-"]] * len(cases))
    with pytest.raises(RunError, match="other bits on other numbers of workers: ce, float32, ce, bf16, triplet"):
        verify.main()


@pytest.mark.slow
def test_more_than_promised_is_a_failure(verified, monkeypatch):
    monkeypatch.setattr(verify, "ONE_STEP", 0.0)
    with pytest.raises(RunError, match=r"more than promised: cross-entropy, .*report"):
        verified()


@pytest.mark.parametrize("workers", [["0"], ["22"], ["two"], []])
def test_a_number_of_workers_that_cannot_be_is_refused(workers, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["verify", "--workers", *workers])
    with pytest.raises(UserError, match=r"^[^\n]*--workers[^\n]*$"):
        verify.main()


@pytest.mark.slow
def test_as_a_command_where_temporary_files_lie_deep(tmp_path):
    folder = tmp_path / ("job-" + "0" * 80)  # a socket's path has 107 bytes
    folder.mkdir()
    command, env = [sys.executable, "-m", "dlops_dist.verify", "--bits"], {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "result: 1, 2, 3, 4 workers compute what one computes"
