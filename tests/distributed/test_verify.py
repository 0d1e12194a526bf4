"""The command that shows the promise on the user's own machine."""

import re
import subprocess
import sys

import pytest

from dlops_dist import verify
from dlops_dist.errors import RunError


def run(*arguments):
    command = [sys.executable, "-m", "dlops_dist.verify", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_ours_agree_and_the_usual_formulations_do_not():
    done = run("--workers", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "result: 2 workers compute what one computes"
    rows = re.findall(r"[│|] (\w[^│|]*?) +[│|] +(0|\de[+-]\d\d) [│|]", done.stdout)
    ours = [float(error) for how, error in rows if how == "ours"]
    usual = [float(error) for how, error in rows if how != "ours"]
    assert len(ours) == 8
    assert max(ours) < 1e-6
    assert len(usual) == 8
    assert min(usual) > 1e-2


def test_more_than_promised_is_a_failure(monkeypatch):
    monkeypatch.setattr(verify, "ONE_STEP", 0.0)
    monkeypatch.setattr(sys, "argv", ["verify", "--workers", "2"])
    with pytest.raises(RunError, match=r"more than promised: cross-entropy, .*report"):
        verify.main()


@pytest.mark.parametrize("workers", [["0"], ["22"], ["two"], []])
def test_a_number_of_workers_that_cannot_be_is_refused_in_one_line(workers):
    done = run("--workers", *workers)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "--workers" in done.stderr
    assert len(done.stderr.splitlines()) == 1
