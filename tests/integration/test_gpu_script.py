"""The check for GPUs, in miniature on the CPU: each of its sections runs, and prints what it found."""

import json
import os
import subprocess
import sys

import pytest
from command import ROOT

SECTIONS = list(range(1, 13))


def check(folder, *arguments):
    """(exit code, what was printed, lines of JSON)."""
    out = folder / "rows.jsonl"
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--out", str(out), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=240,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout, [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.slow
def test_every_section_runs_in_miniature(tmp_path):
    code, output, rows = check(tmp_path)
    assert code == 0, output
    assert [section for section in SECTIONS if not any(row["section"] == section for row in rows)] == []
    assert [row for row in rows if row["ok"] is False] == []
    assert all(row["name"] in output and row["seconds"] >= 0 for row in rows)
    kept = sum(row["ok"] is True for row in rows)
    assert output.splitlines()[-1] == f"result: {kept} of {kept} checks kept, sections left out: none"


@pytest.mark.slow
def test_chosen_sections_alone_run_and_none_begins_at_the_end(tmp_path):
    code, output, rows = check(tmp_path, "--sections", 1, 3)
    assert code == 0, output
    assert {row["section"] for row in rows} == {1, 3}

    code, output, rows = check(tmp_path, "--sections", 1, 3, "--minutes", 0.5)
    assert (code, rows) == (0, [])
    assert output.splitlines()[-1] == "result: 0 of 0 checks kept, sections left out: 1, 3"
