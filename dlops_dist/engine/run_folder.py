"""The folder of a run: its settings, its rows of metrics, its checkpoints."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from dlops_dist.command_line import read_yaml
from dlops_dist.config import TASKS, Settings, result_settings
from dlops_dist.data.shards import Manifest
from dlops_dist.errors import RunError, UserError

FORMAT = 1
KEPT_CHECKPOINTS = 2


class RunFolder:
    """runs/NAME/: config.yaml, metrics.jsonl, checkpoints/, report/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_file = path / "metrics.jsonl"
        self._checkpoints = path / "checkpoints"

    def create(self, task: str, settings: Settings) -> None:
        """Make the folder, or check that the one that is there belongs to the same settings."""
        if self._checkpoint_files() or self.metrics_file.is_file():
            _, existing = self.settings()
            _refuse_other_settings(self.path, result_settings(existing), result_settings(settings))
            return
        self.path.mkdir(parents=True, exist_ok=True)
        content = yaml.safe_dump({"task": task, **settings.model_dump()}, sort_keys=False)
        _replace(self.path / "config.yaml", content.encode())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes of this machine from training the same run."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"runs_dir: {error.filename}: {error.strerror}; choose another --runs-dir") from None
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(folder)
            raise UserError(f"{self.path} is being trained by another process; choose another --name") from None
        try:
            yield
        finally:
            os.close(folder)

    def settings(self) -> tuple[str, Settings]:
        """Task and settings that the run was started with."""
        file = self.path / "config.yaml"
        if not file.is_file():
            raise UserError(f"{self.path} is not a run: no config.yaml in it")
        values = read_yaml(file)
        task = values.pop("task", None)
        if task not in TASKS:
            raise UserError(f"{file}: task {task!r} is none of {', '.join(TASKS)}")
        return task, TASKS[task](**values)

    def rows(self) -> list[dict[str, Any]]:
        """One row of metrics for each epoch; half a last line, left by a machine that went down, is passed over."""
        if not self.metrics_file.is_file():
            return []
        lines = self.metrics_file.read_text().splitlines()
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                if number < len(lines):
                    raise RunError(f"{self.metrics_file}: line {number} is damaged; choose another --name") from None
        return rows

    def finished_row(self, settings: Settings, manifest: Manifest) -> dict[str, Any] | None:
        """The last row of a run whose last checkpoint is that of its last epoch; refuses what `load` refuses."""
        rows, checkpoints = self.rows(), self._checkpoint_files()
        if (
            not rows
            or rows[-1]["epoch"] < settings.total_epochs(manifest.num_folds)
            or checkpoints[-1:] != [self._checkpoint_file(rows[-1]["step"])]
        ):
            return None
        self.load(settings, manifest.id, torch.device("cpu"))
        return rows[-1]

    def keep_rows(self, last_step: int) -> None:
        """Drop the rows that are later than the checkpoint that the run goes on from."""
        kept = "".join(json.dumps(row) + "\n" for row in self.rows() if row["step"] <= last_step)
        if self.metrics_file.is_file() and self.metrics_file.read_text() != kept:
            _replace(self.metrics_file, kept.encode())

    def add_row(self, row: dict[str, Any]) -> None:
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def save(self, settings: Settings, state: dict[str, Any]) -> None:
        """Write the checkpoint of state["step"] whole or not at all, and forget older ones."""
        self._checkpoints.mkdir(exist_ok=True)
        path = self._checkpoint_file(state["step"])
        partial = path.with_name(f".{path.name}.partial")
        threads = torch.get_num_threads()
        content = {"format": FORMAT, "settings": result_settings(settings), "threads": threads, **state}
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        for old in self._checkpoint_files()[:-KEPT_CHECKPOINTS]:
            old.unlink()

    def load(self, settings: Settings, dataset_id: str | None, device: torch.device) -> dict[str, Any] | None:
        """The latest checkpoint, or None. One of other settings, data or format is refused by name."""
        files = self._checkpoint_files()
        if not files:
            return None
        path = files[-1]
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(f"{path} cannot be read ({why}); delete it to go on without it") from None
        if state.get("format") != FORMAT:
            raise UserError(
                f"{path} has format {state.get('format')}, this version reads {FORMAT}; choose another --name"
            )
        _refuse_other_settings(self.path, state["settings"], result_settings(settings))
        if dataset_id not in (None, state["dataset_id"]):
            raise UserError(
                f"{self.path}: the run was trained on dataset {state['dataset_id'][:12]}, data.shards is now "
                f"{dataset_id[:12]}; choose another --name"  # type: ignore[index]
            )
        return state

    def _checkpoint_file(self, step: int) -> Path:
        return self._checkpoints / f"step-{step:09d}.pt"

    def _checkpoint_files(self) -> list[Path]:
        return sorted(self._checkpoints.glob("step-*.pt"))


def _refuse_other_settings(path: Path, existing: dict[str, Any], wanted: dict[str, Any]) -> None:
    changed = [n for n in wanted if _plain(existing.get(n)) != _plain(wanted[n])]
    if changed:
        shown = ", ".join(f"{n} {existing.get(n)} there, {wanted[n]} here" for n in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(f"{path} is a run with other settings ({shown}{more}); choose another --name")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.rename(path)
