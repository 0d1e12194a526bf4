"""Which points of a sweep did best, and how much each parameter had to do with it."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dlops_dist.config import Parameter, Point, Value
from dlops_dist.sweep.folder import Trial

FEWEST_POINTS = 5
"""Below them, a curve fits whatever happened."""


@dataclass(frozen=True)
class Ranked:
    """A point with its trials, one for each seed."""

    point: Point
    trials: tuple[Trial, ...]

    @property
    def scores(self) -> list[float]:
        return [trial.score for trial in self.trials if trial.score is not None]

    @property
    def mean(self) -> float | None:
        return statistics.mean(self.scores) if self.scores else None

    @property
    def deviation(self) -> float | None:
        """Of the seeds, as a sample's; None for a single one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def epochs(self) -> int:
        """That every seed has reached."""
        return min(len(trial.rows) for trial in self.trials)

    @property
    def finished(self) -> bool:
        return all(trial.finished for trial in self.trials)


def ranking(trials: Sequence[Trial]) -> list[Ranked]:
    """The points, best first: by the epochs that all their seeds reached, then by mean held-out accuracy."""
    by_point: dict[tuple[Value, ...], list[Trial]] = {}
    for trial in trials:
        by_point.setdefault(tuple(trial.point.values()), []).append(trial)
    ranked = [Ranked(own[0].point, tuple(sorted(own, key=lambda t: t.seed))) for own in by_point.values()]
    return sorted(ranked, key=lambda r: (-r.epochs, -(r.mean or 0.0), str(r.point)))


def importance(parameter: Parameter, ranked: Sequence[Ranked]) -> float | None:
    """The part of the finished points' variance of accuracy that the parameter explains on its own.

    Adjusted R^2 = 1 - (1 - R^2) (n - 1) / (n - p), at least 0, of a parabola in the value (log-uniform: in its
    logarithm) or, where all there is are some values, of their means; n points, p coefficients. None where points are
    too few, or all equal. What parameters do only together is nobody's part.
    """
    finished = [point for point in ranked if point.finished]
    values = [point.point[parameter.name] for point in finished]
    scores = np.array([point.mean for point in finished], dtype=float)
    if parameter.is_interval:
        x = np.array([math.log(float(v)) if parameter.kind == "log-uniform" else float(v) for v in values])
        columns = np.stack([np.ones_like(x), x - x.mean(), (x - x.mean()) ** 2], axis=1) if len(x) else np.ones((0, 3))
    else:
        columns = np.array([[float(v == one) for one in dict.fromkeys(values)] for v in values])
    spare = len(scores) - columns.shape[-1]
    if len(scores) < FEWEST_POINTS or spare < 1 or not scores.std():
        return None
    fitted = columns @ np.linalg.lstsq(columns, scores, rcond=None)[0]
    unexplained = ((scores - fitted) ** 2).sum() / ((scores - scores.mean()) ** 2).sum()
    return max(0.0, 1 - float(unexplained) * (len(scores) - 1) / spare)
