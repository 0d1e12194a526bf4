"""How every figure here is measured: all sides in turn, the median of several runs, and their ratios."""

import statistics
import time
from collections.abc import Callable, Mapping


def medians(
    sides: Mapping[str, Callable[[], object]], runs: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each side, called in turn after one call of each that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for run in range(runs + 1):
        for name, side in sides.items():
            started = clock()
            side()
            if run:
                times[name].append(clock() - started)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def alternate(ours: Callable[[], object], theirs: Callable[[], object], runs: int = 7) -> tuple[float, float]:
    """Median seconds of both."""
    found = medians({"ours": ours, "theirs": theirs}, runs)
    return found["ours"], found["theirs"]
