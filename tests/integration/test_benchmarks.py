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
@pytest.mark.parametrize(("more", "codes"), [([], [0, 0]), (["--shards", "nowhere"], [0, 1])])
def test_a_table_and_lines_of_json_show_what_each_printed_with_machine_and_load(more, codes, tmp_path):
    out = tmp_path / "rows.jsonl"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--out", str(out), "--only", "step", "bare_loop", *more],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=240,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["benchmark"], row["code"], row["quick"]) for row in rows] == [
        ("step", codes[0], True),
        ("bare_loop", codes[1], True),
    ]
    assert all(0 <= row["busy"] <= 1 and row["cores"] >= 1 and row["torch"] and row["seconds"] > 0 for row in rows)
    assert any(line.startswith("P5 step: ours ") for line in rows[0]["printed"])
    assert ("nowhere" if codes[1] else "epoch 2/2  test top-1 ") in rows[1]["printed"][-1]
    assert (done.returncode, "busy before" in done.stdout) == (codes[1], True)
    assert done.stdout.splitlines()[-1] == f"failed: {'bare_loop' if codes[1] else 'none'}"
