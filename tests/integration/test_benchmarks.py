"""benchmarks/all.py knows every benchmark, and shows what some of them print, in miniature."""

import json
import os
import runpy
import subprocess
import sys

import pytest
from command import ROOT

SCRIPT = ROOT / "benchmarks/all.py"


def test_every_benchmark_is_known():
    names = runpy.run_path(str(SCRIPT))
    files = {p.stem for p in SCRIPT.parent.glob("*.py") if '__name__ == "__main__"' in p.read_text()}
    assert names["QUICK"].keys() == files - {"all"}
    assert set(names["ON_SHARDS"]) < files


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_a_table_and_lines_of_json_show_what_each_printed_with_machine_and_load(fails, tmp_path):
    out, names = tmp_path / "rows.jsonl", ["bare_loop"] if fails else ["step", "bare_loop"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--out", str(out), "--only", *names, *["--shards", "nowhere"] * fails],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=240,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["benchmark"], row["code"], row["quick"]) for row in rows] == [
        (name, int(fails), True) for name in names
    ]
    assert all(0 <= row["busy"] <= 1 and row["cores"] >= 1 and row["torch"] and row["seconds"] > 0 for row in rows)
    assert fails or any(line.startswith("P5 step: ours ") for line in rows[0]["printed"])
    assert ("nowhere" if fails else "epoch 2/2  test top-1 ") in rows[-1]["printed"][-1]
    assert (done.returncode, "busy before" in done.stdout) == (int(fails), True)
    assert done.stdout.splitlines()[-1] == f"failed: {'bare_loop' if fails else 'none'}"
