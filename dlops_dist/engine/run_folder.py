"""The folder of a run: its settings, its rows of metrics, its checkpoints."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from dlops_dist.command_line import parse_yaml
from dlops_dist.config import TASKS, Settings, result_settings
from dlops_dist.data.locks import locked
from dlops_dist.data.shards import Manifest
from dlops_dist.engine.checkpoints import Checkpoints
from dlops_dist.errors import RunError, UserError
from dlops_dist.files import Folder

FORMAT = 2
CONFIG, METRICS = "config.yaml", "metrics.jsonl"


class RunFolder:
    """RUNS_DIR/NAME/: config.yaml, metrics.jsonl, checkpoints/, report/; here or at a URL.

    Args:
        place: path or URL.
        kept: how many of the latest checkpoints stay, besides the best.
    """

    def __init__(self, place: str | Path, kept: int = 2) -> None:
        self.folder = Folder(place)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", kept)

    @classmethod
    def of(cls, settings: Settings) -> "RunFolder":
        """That of a prepared run."""
        return cls(str(Folder(settings.runs_dir) / str(settings.name)), settings.keep_checkpoints)

    def __str__(self) -> str:
        return str(self.folder)

    def create(self, task: str, settings: Settings) -> None:
        """Make the folder, or check that the one that is there belongs to the same settings."""
        if METRICS in self.folder.names() or self.checkpoints.steps():
            _, existing = self.settings()
            refuse_other_settings(self, result_settings(existing), result_settings(settings))
            return
        self.folder.write_text(CONFIG, yaml.safe_dump({"task": task, **settings.model_dump()}, sort_keys=False))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes of this machine from training the same run. At a URL nothing can."""
        path = self.folder.local
        if path is None:
            yield
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"runs_dir: {error.filename}: {error.strerror}; choose another --runs-dir") from None
        with locked(path, "trained"):
            yield

    def settings(self) -> tuple[str, Settings]:
        """Task and settings that the run was started with."""
        where = self.folder / CONFIG
        try:
            with self.folder.open(CONFIG) as file:
                values = parse_yaml(str(where), file.read())
        except FileNotFoundError:
            raise UserError(f"{self} is not a run: no {CONFIG} in it") from None
        task = values.pop("task", None)
        if task not in TASKS:
            raise UserError(f"{where}: task {task!r} is none of {', '.join(TASKS)}")
        return task, TASKS[task](**values)

    def rows(self) -> list[dict[str, Any]]:
        """One row of metrics for each epoch."""
        try:
            with self.folder.open(METRICS) as file:
                lines = file.read().splitlines()
        except FileNotFoundError:
            return []
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                where = f"{self.folder / METRICS}: line {number}"
                raise RunError(f"{where} is damaged; choose another --name") from None
        return rows

    def finished_row(self, settings: Settings, manifest: Manifest) -> dict[str, Any] | None:
        """The last row of a run whose last checkpoint is that of its last epoch; refuses what `load` refuses."""
        rows, steps = self.rows(), self.checkpoints.steps()
        if (
            not rows
            or rows[-1]["epoch"] < settings.total_epochs(manifest.num_folds)
            or steps[-1:] != [rows[-1]["step"]]
        ):
            return None
        try:
            state = self.checkpoints.load(steps[-1], torch.device("cpu"))
        except RunError:  # damaged: going on from the one before finishes the run again
            return None
        self._check(state, settings, manifest.id)
        return rows[-1]

    def keep_rows(self, last_step: int) -> None:
        """Drop the rows that are later than the checkpoint that the run goes on from."""
        rows = self.rows()
        if rows and rows[-1]["step"] > last_step:
            self._write_rows([row for row in rows if row["step"] <= last_step])

    def add_row(self, row: dict[str, Any]) -> None:
        self._write_rows([*self.rows(), row])

    def save(self, settings: Settings, state: dict[str, Any]) -> None:
        """Write the checkpoint of state["step"], beside the steps that follow."""
        content = {
            "format": FORMAT, "settings": result_settings(settings), "threads": torch.get_num_threads(), **state,
        }  # fmt: skip
        best = best_row(self.rows())
        self.checkpoints.save(state["step"], content, None if best is None else best["step"])

    def load(
        self, settings: Settings, dataset_id: str, device: torch.device, warn: Callable[[str], None]
    ) -> dict[str, Any] | None:
        """The latest whole checkpoint, or None. One of other settings, data or format is refused by name."""
        state = self.checkpoints.latest(device, warn)
        if state is not None:
            self._check(state, settings, dataset_id)
        return state

    def result(self, device: torch.device, warn: Callable[[str], None]) -> dict[str, Any]:
        """The checkpoint that is the run's result: the best, where a part of train was held out, else the latest."""
        best = best_row(self.rows())
        if best is not None and best["step"] in self.checkpoints.steps():
            state: dict[str, Any] | None = self.checkpoints.load(best["step"], device)
        else:
            state = self.checkpoints.latest(device, warn)
        if state is None:
            raise UserError(f"{self} has no checkpoint yet; train it first")
        self._check(state, self.settings()[1])
        return state

    def _check(self, state: dict[str, Any], settings: Settings, dataset_id: str | None = None) -> None:
        if state.get("format") != FORMAT:
            where = f"{self}: its checkpoints have format {state.get('format')}"
            raise UserError(f"{where}, this version reads {FORMAT}; choose another --name")
        refuse_other_settings(self, state["settings"], result_settings(settings))
        if dataset_id not in (None, state["dataset_id"]):
            raise UserError(
                f"{self}: the run was trained on dataset {state['dataset_id'][:12]}, data.shards is now "
                f"{str(dataset_id)[:12]}; choose another --name"
            )

    def _write_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        self.folder.write_text(METRICS, "".join(json.dumps(row) + "\n" for row in rows))


def best_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the epoch with the highest val/top1 of a run's last stage, the earliest of equals.

    None where nothing was held out, or nothing is classified yet.
    """
    judged = [row for row in rows if "val/top1" in row and row.get("stage") == rows[-1].get("stage")]
    return max(judged, key=lambda row: row["val/top1"], default=None)


def result_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row that is a run's result: the best on the held-out part of train, where there is one, else the last."""
    return best_row(rows) or rows[-1]


def refuse_other_settings(where: object, existing: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to go on in a folder whose result comes from settings that are not those wanted."""
    changed = [n for n in wanted if _plain(existing.get(n)) != _plain(wanted[n])]
    if changed:
        shown = ", ".join(f"{n} {existing.get(n)} there, {wanted[n]} here" for n in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(f"{where} was started with other settings ({shown}{more}); choose another --name")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
