"""The rows of metrics of a run, one for each epoch: as text, and which of them is its result."""

import json
import math
from collections.abc import Sequence
from typing import Any

from dlops_dist.config import Run
from dlops_dist.figures import gain


def rows_before(state: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The rows of the epochs before a checkpoint, without times: checkpoints of equal runs are equal files."""
    return [] if state is None else parsed(state["rows"].encode())


def timeless(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what may differ between two runs of the same command."""
    return [{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows]


def text_of(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def parsed(content: bytes) -> list[dict[str, Any]]:
    """Raises ValueError: names the line that is not a row."""
    rows = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(line)
            whole = isinstance(row, dict) and {"epoch", "step"} <= row.keys()
        except ValueError:
            whole = False
        if not whole:
            raise ValueError(f"line {number} is damaged")
        rows.append(row)
    return rows


def best_row(rows: Sequence[dict[str, Any]], choose_by: str) -> dict[str, Any] | None:
    """The row of the epoch with the highest figure `choose_by` of a run's last stage, of a loss the lowest; the
    earliest of equals. None where nothing was held out, or it is a figure of nothing yet.
    """
    judged = [r for r in rows if r.get(choose_by) is not None and r.get("stage") == rows[-1].get("stage")]
    return max(judged, key=lambda row: gain(choose_by, row[choose_by]), default=None)


def result_row(rows: Sequence[dict[str, Any]], choose_by: str) -> dict[str, Any]:
    """The row that is a run's result: the best on the held-out part of train, where there is one, else the last."""
    return best_row(rows, choose_by) or rows[-1]


def is_out_of_patience(rows: Sequence[dict[str, Any]], settings: Run) -> bool:
    """Whether the last `patience` epochs have not bettered what a run is chosen by."""
    best = best_row(rows, settings.choose_by)
    return best is not None and settings.patience is not None and rows[-1]["epoch"] - best["epoch"] >= settings.patience


def step_of(line: bytes) -> float:
    """Of a row of a step; that of a killed process's last, of which only a part was written, is later than all."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except ValueError:
        return math.inf
