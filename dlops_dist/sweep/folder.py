"""The folder of a sweep: what it searches, its trials, what they came to, and which point is the best."""

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dlops_dist.config import (
    SHIPPED,
    Parameter,
    Point,
    Run,
    Sweep,
    Value,
    flat,
    is_loaded,
    load_recipe,
    result_settings,
    sweep_type,
    trial_settings,
)
from dlops_dist.config.yaml_file import read_yaml
from dlops_dist.data.shards import read_manifest
from dlops_dist.engine import prepare
from dlops_dist.engine.resume import refuse_other_settings
from dlops_dist.engine.run_folder import RunFolder
from dlops_dist.errors import UserError
from dlops_dist.figures import gain
from dlops_dist.files import Folder, write_file
from dlops_dist.sweep.points import points_of, suggest

SWEEP, BEST, ENDED = "sweep.yaml", "best.yaml", "ended.json"
OF_A_PLACE = {"name", "runs_dir", "config", "smoke", "local", "workers", "wandb", "tensorboard"}
"""Settings of the sweep's runs that best.yaml leaves to whoever takes it."""
FEWEST_POINTS = 5
"""Below them, a curve fits whatever happened."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep, as far as it came."""

    name: str
    point: Point
    seed: int
    scores: list[float | None]
    """What it is compared by (`choose_by`), after each epoch of its last stage; None where that cannot be."""
    epochs: int
    """How many of those there are to be."""
    failed: str | None
    """Why it could not go on."""
    stopped: bool
    """Whether the scheduler gave it up."""

    @property
    def finished(self) -> bool:
        return len(self.scores) >= self.epochs


@dataclass(frozen=True)
class Ranked:
    """A point with its trials, one for each seed."""

    point: Point
    trials: tuple[Trial, ...]

    @property
    def scores(self) -> list[float]:
        """Those of the seeds' last epochs."""
        return [last for trial in self.trials for last in trial.scores[-1:] if last is not None]

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
        return min(len(trial.scores) for trial in self.trials)

    @property
    def finished(self) -> bool:
        return all(trial.finished for trial in self.trials)


def ranking(trials: Sequence[Trial], choose_by: str) -> list[Ranked]:
    """The points, best first: by the epochs that all their seeds reached, then by the mean of their figures."""
    by_point: dict[tuple[Value, ...], list[Trial]] = {}
    for trial in trials:
        by_point.setdefault(tuple(trial.point.values()), []).append(trial)
    ranked = [Ranked(own[0].point, tuple(sorted(own, key=lambda t: t.seed))) for own in by_point.values()]
    return sorted(ranked, key=lambda r: (-r.epochs, -gain(choose_by, r.mean), str(r.point)))


def importance(parameter: Parameter, ranked: Sequence[Ranked]) -> float | None:
    """The part of the finished points' variance that the parameter explains on its own.

    Adjusted R^2 = 1 - (1 - R^2) (n - 1) / (n - p), at least 0, of a parabola in the value (log-uniform: in its
    logarithm) or, where all there is are some values, of their means; n points, p coefficients. None where points are
    too few, or all equal. What parameters do only together is nobody's part.
    """
    finished = [point for point in ranked if point.finished and point.mean is not None]
    values = [point.point[parameter.name] for point in finished]
    means = np.array([point.mean for point in finished], dtype=float)
    if parameter.is_interval:
        x = np.array([math.log(float(v)) if parameter.kind == "log-uniform" else float(v) for v in values])
        columns = np.vander(x - (x.mean() if len(x) else 0), 3)
    else:
        columns = np.array([[float(v == one) for one in dict.fromkeys(values)] for v in values])
    spare = len(means) - columns.shape[-1]
    if len(means) < FEWEST_POINTS or spare < 1 or not means.std():
        return None
    fitted = columns @ np.linalg.lstsq(columns, means, rcond=None)[0]
    unexplained = ((means - fitted) ** 2).sum() / ((means - means.mean()) ** 2).sum()
    return max(0.0, 1 - float(unexplained) * (len(means) - 1) / spare)


def is_compared(settings: Run, row: dict[str, Any]) -> bool:
    """Whether trials are compared after the row's epoch: it is one of a run's last stage."""
    return bool(row["epoch"] > settings.total_epochs(0) - settings.epochs)


def gain_of(settings: Run, row: dict[str, Any]) -> float:
    """What a trial has come to after an epoch, the higher the better."""
    if settings.choose_by not in row:
        there = ", ".join(name for name in row if name.startswith("val/") and not isinstance(row[name], list))
        raise UserError(f"choose_by: {settings.choose_by} is none of the figures, which are {there}")
    return gain(settings.choose_by, row[settings.choose_by])


def is_sweep(path: Path) -> bool:
    return (path / SWEEP).is_file()


class SweepFolder:
    """runs/SWEEP/: sweep.yaml, a run's folder for each trial, and in the end best.yaml and report/."""

    def __init__(self, path: Path, task: str, sweep: Sweep) -> None:
        self.path, self.task, self.sweep = path, task, sweep

    @classmethod
    def open(cls, path: Path) -> "SweepFolder":
        """That of a sweep, as it was called last."""
        values = read_yaml(path / SWEEP)
        task = values.pop("task", None)
        if not isinstance(task, str) or not is_loaded(task):
            ours = f"none of our recipes ({', '.join(SHIPPED)})"
            raise UserError(f"{path / SWEEP}: task {task!r} is {ours}; pass --recipe FILE")
        return cls(path, task, sweep_type(load_recipe(task).settings_type)(**values))

    def create(self) -> None:
        """Make the folder, or check that the one that is there is of the same search."""
        if is_sweep(self.path):
            existing = SweepFolder.open(self.path).sweep
            refuse_other_settings(self.path, result_settings(existing), result_settings(self.sweep))
        self._write(SWEEP, self.sweep.model_dump())

    def _write(self, name: str, settings: dict[str, Any], comment: str = "") -> None:
        text = yaml.safe_dump({"task": self.task, **settings}, sort_keys=False)
        Folder(self.path).write_text(name, comment + text)

    def trial(self, name: str) -> Trial:
        run = RunFolder(self.path / name)
        _, settings = run.settings()
        values = flat(settings.model_dump())
        point = {parameter.name: values[parameter.name] for parameter in self.sweep.parameters}
        scores = [row.get(settings.choose_by) for row in run.rows() if is_compared(settings, row)]
        return Trial(name, point, settings.seed, scores, settings.epochs, **_end_of(self.path / name))

    def ranking(self) -> list[Ranked]:
        """Of the trials that have a folder: of a random search all, of Optuna's those that were begun."""
        names = sorted(path.parent.name for path in self.path.glob("*/config.yaml"))
        return ranking([self.trial(name) for name in names], self.sweep.choose_by)

    def known_trials(self) -> list[Run]:
        """The runs that are known beforehand: all of a random search, of Optuna's those that were begun.

        None of them twice: draws from an interval of whole numbers meet.
        """
        if self.sweep.search == "random":
            points = points_of(self.sweep.parameters, self.sweep.num_samples, self.sweep.seed)
        else:
            points = [ranked.point for ranked in self.ranking()]
        runs = [settings for point in points for settings in self._runs_of(point)]
        return list({settings.name: settings for settings in runs}.values())

    def suggested_trials(self) -> Iterator[Run]:
        """The runs of the points that Optuna suggests, each by what has come of the others when it is wanted.

        A space that is exhausted ends them early.
        """
        sweep = self.sweep
        for attempt in range(sweep.num_samples * 10):
            ranked = self.ranking()
            if len(ranked) >= sweep.num_samples:
                return
            over = [r for r in ranked if r.finished or any(trial.failed for trial in r.trials)]
            gains = [(r.point, gain(sweep.choose_by, r.mean)) for r in over]
            runs = self._runs_of(suggest(sweep.parameters, gains, sweep.seed + len(ranked) + attempt))
            if runs[0].name not in [trial.name for other in ranked for trial in other.trials]:
                self.create_runs(runs)
                yield from runs

    def _runs_of(self, point: Point) -> list[Run]:
        """One for each seed, in a folder that is named by what makes its result."""
        inside = self.sweep.model_copy(update={"runs_dir": str(self.path)})
        seeds = range(inside.seed, inside.seed + inside.seeds)
        return [prepare(self.task, trial_settings(inside, point, seed)) for seed in seeds]

    def create_runs(self, runs: Sequence[Run]) -> None:
        """Make their folders, so that the sweep's tables show them before they begin."""
        for settings in runs:
            RunFolder.of(settings).create(self.task, settings)

    def is_over(self, settings: Run) -> bool:
        """Whether a prepared trial needs no more training: it is complete, or the scheduler gave it up."""
        path = self.path / str(settings.name)
        if RunFolder(path).finished_row(settings, read_manifest(Path(settings.data.shards))) is not None:
            return True
        return self.sweep.scheduler != "none" and _end_of(path)["stopped"]

    def write_best(self, point: Point) -> Path:
        """Write the settings of a point's runs to a file for `train --config`."""
        settings = trial_settings(self.sweep, point, self.sweep.seed).model_dump(exclude=OF_A_PLACE)
        comment = f"# The best point of {self.path.name}.  python -m dlops_dist.train {self.task} --config FILE\n"
        self._write(BEST, settings, f"{comment}# --data.val-fraction 0 trains on what was held out, too.\n")
        return self.path / BEST


def note_end(trial: Path, failed: str | None = None, stopped: bool = False) -> None:
    """Say in a trial's folder why it ended before its last epoch."""
    content = json.dumps({"failed": failed, "stopped": stopped})
    write_file(trial / ENDED, lambda file: file.write(content.encode()))  # its workers may be writing there still


def _end_of(trial: Path) -> dict[str, Any]:
    file = trial / ENDED
    return json.loads(file.read_text()) if file.is_file() else {"failed": None, "stopped": False}
