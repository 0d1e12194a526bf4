"""How every figure here is measured: both sides in turn, the median of several runs, and their ratio."""

import statistics
import time
from collections.abc import Callable


def alternate(ours: Callable[[], object], theirs: Callable[[], object], runs: int = 7) -> tuple[float, float]:
    """Median seconds of each, called in turn after one call of each that is not counted."""
    times: dict[Callable[[], object], list[float]] = {ours: [], theirs: []}
    for run in range(runs + 1):
        for side, seconds in times.items():
            started = time.perf_counter()
            side()
            if run:
                seconds.append(time.perf_counter() - started)
    return statistics.median(times[ours]), statistics.median(times[theirs])
