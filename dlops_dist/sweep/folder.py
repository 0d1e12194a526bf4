"""The folder of a sweep: what it searches, and what its trials came to."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dlops_dist.command_line import read_yaml
from dlops_dist.config import (
    SHIPPED,
    Point,
    Run,
    Sweep,
    flat,
    is_loaded,
    load_recipe,
    result_settings,
    sweep_type,
    trial_settings,
)
from dlops_dist.config.sweep import ACCURACY
from dlops_dist.data.shards import read_manifest
from dlops_dist.engine.run_folder import RunFolder, refuse_other_settings
from dlops_dist.errors import UserError
from dlops_dist.files import Folder, write_file

SWEEP, BEST, ENDED = "sweep.yaml", "best.yaml", "ended.json"
OF_A_PLACE = {"name", "runs_dir", "config", "smoke", "local", "workers", "wandb", "tensorboard"}
"""Settings of the sweep's runs that best.yaml leaves to whoever takes it."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep, as far as it came."""

    name: str
    point: Point
    seed: int
    rows: list[dict[str, Any]]
    """Of the epochs that were judged on the held-out part."""
    epochs: int
    """How many of those there are to be."""
    failed: str | None
    """Why it could not go on."""
    stopped: bool
    """Whether the scheduler gave it up."""

    @property
    def score(self) -> float | None:
        """Accuracy on the held-out part after the last epoch."""
        return self.rows[-1][ACCURACY] if self.rows else None

    @property
    def finished(self) -> bool:
        return len(self.rows) >= self.epochs


class SweepFolder:
    """runs/SWEEP/: sweep.yaml, a run's folder for each trial, and in the end best.yaml and report/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pictures = path / "report"

    def create(self, task: str, sweep: Sweep) -> None:
        """Make the folder, or check that the one that is there is of the same search."""
        if self.is_sweep():
            _, existing = self.settings()
            refuse_other_settings(self.path, result_settings(existing), result_settings(sweep))
        Folder(self.path).write_text(SWEEP, yaml.safe_dump({"task": task, **sweep.model_dump()}, sort_keys=False))

    def is_sweep(self) -> bool:
        return (self.path / SWEEP).is_file()

    def settings(self) -> tuple[str, Sweep]:
        """Task and settings of the sweep, as it was called last."""
        file = self.path / SWEEP
        values = read_yaml(file)
        task = values.pop("task", None)
        if not isinstance(task, str) or not is_loaded(task):
            raise UserError(f"{file}: task {task!r} is none of our recipes ({', '.join(SHIPPED)}); pass --recipe FILE")
        return task, sweep_type(load_recipe(task).settings_type)(**values)

    def trials(self) -> list[Trial]:
        """Those that have a folder: of a random search all, of Optuna's those that were begun."""
        names = sorted(path.parent.name for path in self.path.glob("*/config.yaml"))
        searched = self._searched()
        return [self._trial(name, searched) for name in names]

    def trial(self, name: str) -> Trial:
        return self._trial(name, self._searched())

    def _searched(self) -> list[str]:
        return [parameter.name for parameter in self.settings()[1].parameters]

    def _trial(self, name: str, searched: list[str]) -> Trial:
        path = self.path / name
        run = RunFolder(path)
        settings = flat(run.settings()[1].model_dump())
        rows = [row for row in run.rows() if ACCURACY in row]
        point = {setting: settings[setting] for setting in searched}
        return Trial(name, point, settings["seed"], rows, settings["epochs"], **_ended(path))

    def is_over(self, settings: Run) -> bool:
        """Whether a prepared trial needs no more training: it is complete, or the scheduler gave it up."""
        path = self.path / str(settings.name)
        if RunFolder(path).finished_row(settings, read_manifest(Path(settings.data.shards))) is not None:
            return True
        _, sweep = self.settings()
        return sweep.scheduler != "none" and _ended(path)["stopped"]

    def write_best(self, point: Point) -> Path:
        """Write the settings of a point's runs to a file for `train --config`."""
        task, sweep = self.settings()
        settings = trial_settings(sweep, point, sweep.seed).model_dump(exclude=OF_A_PLACE)
        path = self.path / BEST
        comment = f"# The best point of {self.path.name}.  python -m dlops_dist.train {task} --config FILE\n"
        comment += "# --data.val-fraction 0 trains on what was held out, too.\n"
        Folder(self.path).write_text(BEST, comment + yaml.safe_dump({"task": task, **settings}, sort_keys=False))
        return path


def note_end(trial: Path, failed: str | None = None, stopped: bool = False) -> None:
    """Say in a trial's folder why it ended before its last epoch."""
    content = json.dumps({"failed": failed, "stopped": stopped})
    write_file(trial / ENDED, lambda file: file.write(content.encode()))  # its workers may be writing there still


def forget_end(trial: Path) -> None:
    (trial / ENDED).unlink(missing_ok=True)


def _ended(trial: Path) -> dict[str, Any]:
    file = trial / ENDED
    return json.loads(file.read_text()) if file.is_file() else {"failed": None, "stopped": False}
