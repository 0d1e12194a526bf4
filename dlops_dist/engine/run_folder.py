"""The folder of a run: its settings, its rows of metrics, its checkpoints."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path, PurePath
from typing import Any

import torch
import yaml

from dlops_dist.command_line import parse_yaml
from dlops_dist.config import SHIPPED, Run, common_settings, is_loaded, load_recipe, result_settings
from dlops_dist.data.shards import Manifest, read_manifest
from dlops_dist.engine.checkpoints import ANEW, Checkpoints
from dlops_dist.errors import RunError, UserError, first_line
from dlops_dist.files import Folder, locked, make_writable

FORMAT = 3
CONFIG, METRICS, STEPS = "config.yaml", "metrics.jsonl", "steps.jsonl"
CPU = torch.device("cpu")
EXTENDABLE = ("constant", "step")
"""Schedules by which a step's learning rate does not depend on how many are to come."""


class RunFolder:
    """RUNS_DIR/NAME/: config.yaml, metrics.jsonl, steps.jsonl, checkpoints/, report/; here or at a URL.

    Args:
        place: path or URL.
        kept: how many of the latest checkpoints stay, besides the best.
    """

    def __init__(self, place: str | Path, kept: int = 2) -> None:
        self.folder = Folder(place)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", kept)
        self._trained: list[dict[str, Any]] = []
        """Rows of the run that is being trained here: those of its checkpoint, and what followed."""

    @classmethod
    def of(cls, settings: Run) -> "RunFolder":
        """That of a prepared run."""
        return cls(str(Folder(settings.runs_dir) / str(settings.name)), settings.keep_checkpoints)

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def name(self) -> str:
        """What the run is called where it lies now."""
        local = self.folder.local
        return PurePath(str(self)).name if local is None else local.absolute().name

    def create(self, task: str, settings: Run) -> None:
        """Make the folder, or check that the run in it can go on with these settings; its config then tells them.

        A run may have been moved or renamed, and its config been lost: what it was started with is in its checkpoints.
        """
        text = yaml.safe_dump({"task": task, **settings.model_dump()}, sort_keys=False).encode()
        config = self._read(CONFIG)
        if not self.checkpoints.steps() and (rows := self.rows()):
            if config is None or len(rows) > 1:  # a single row may wait for a checkpoint that was never written
                raise UserError(
                    f"{self} has rows of {len(rows)} epochs in {METRICS}, but no checkpoint to go on from; put "
                    f"checkpoints/ back, {ANEW}"
                )
            self._refuse_other_settings(result_settings(self.settings()[1]), settings)
        if config == text:
            return
        state = self.checkpoints.latest(CPU, warn=lambda _: None)  # whoever goes on from it warns
        if state is not None:
            self._check(state, settings, read_manifest(Path(settings.data.shards)).id)
        try:
            self.folder.write(CONFIG, lambda file: file.write(text))
        except Exception as error:  # each kind of storage has its own
            why = getattr(error, "strerror", None) or first_line(error)
            raise UserError(f"runs_dir: {self} cannot be written to ({why}); choose another --runs-dir") from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes of this machine from training the same run. At a URL nothing can."""
        path = self.folder.local
        if path is None:
            yield
            return
        make_writable(path, "runs_dir", "choose another --runs-dir")
        with locked(path, "trained"):
            yield

    def settings(self) -> tuple[str, Run]:
        """Recipe and settings that the run was trained with last; of a user's that this process has not been pointed
        to, those settings that every run has: nothing in the folder is executed.
        """
        where, content = self.folder / CONFIG, self._read(CONFIG)
        if content is None:
            advice = "; the command that trained it writes it again" if self.checkpoints.steps() else ""
            raise UserError(f"{self} is not a run: no {CONFIG} in it{advice}")
        values = parse_yaml(str(where), content)
        task = values.pop("task", None)
        if not isinstance(task, str):
            raise UserError(f"{where}: task {task!r} is the name of no recipe")
        if is_loaded(task):
            return task, load_recipe(task).settings_type(**values)
        if "." not in task:
            raise UserError(f"{where}: task {task!r} is none of {', '.join(SHIPPED)}, nor the path of a recipe")
        return task, common_settings(values)

    def rows(self) -> list[dict[str, Any]]:
        """One row of metrics for each epoch; those of the latest checkpoint, where the file is damaged or missing."""
        content, damage = self._read(METRICS), ""
        try:
            if content:
                return _parsed(content)
        except ValueError as error:
            damage = str(error)
        state = self.checkpoints.latest(CPU, warn=lambda _: None)
        if state is not None:
            self._check_format(state)
            return rows_before(state)
        if damage:
            where = f"{self.folder / METRICS}: {damage}, and no checkpoint holds its rows"
            raise RunError(f"{where}; {ANEW}")
        return []

    def finished_row(
        self, settings: Run, manifest: Manifest, warn: Callable[[str], None] = lambda _: None
    ) -> dict[str, Any] | None:
        """The last row of a run whose last checkpoint is that of its last epoch; refuses what `load` refuses."""
        steps = self.checkpoints.steps()
        try:
            state = self.checkpoints.load(steps[-1], CPU) if steps else None
        except RunError:  # damaged: going on from the one before finishes the run again
            return None
        if state is None:
            return None
        self._check(state, settings, manifest.id)
        if state["epoch"] < settings.total_epochs(manifest.num_folds):
            return None
        self.restore_rows(state, warn)
        return rows_before(state)[-1]

    def restore_rows(self, state: dict[str, Any] | None, warn: Callable[[str], None]) -> None:
        """Let metrics.jsonl hold the rows before the checkpoint that the run goes on from, and no others."""
        self._trained = rows_before(state)
        there, text = self._read(METRICS) or b"", _text(self._trained).encode()
        if there != text:
            self.folder.write(METRICS, lambda file: file.write(text))
            where, later = self.folder / METRICS, len(there.removeprefix(text).splitlines())
            if there.startswith(text):
                warn(f"{where}: its last {later} rows are in no checkpoint; the run goes on from before them")
            else:
                warn(f"{where} was missing or damaged; its {len(self._trained)} rows are those of the checkpoint")
        self._keep_steps(0 if state is None else state["step"])

    def _keep_steps(self, last_step: int) -> None:
        """Drop the rows of steps that are later than the checkpoint."""
        lines = (self._read(STEPS) or b"").splitlines(keepends=True)
        kept = list(takewhile(lambda line: _step_of(line) <= last_step, lines))
        if len(kept) < len(lines):
            self.folder.write(STEPS, lambda file: file.writelines(kept))

    def add_steps(self, rows: Sequence[dict[str, Any]]) -> None:
        """Rows of steps that were logged, after those that are there."""
        self.folder.append(STEPS, _text(rows))

    def add_row(self, row: dict[str, Any]) -> None:
        """That of an epoch whose checkpoint follows; the checkpoint before is safe by then."""
        self.checkpoints.wait()
        self._trained.append(row)
        self.folder.write_text(METRICS, _text(self._trained))

    def save(self, settings: Run, state: dict[str, Any]) -> None:
        """Write the checkpoint of state["step"], beside the steps that follow."""
        content = {
            "format": FORMAT, "settings": result_settings(settings), "threads": torch.get_num_threads(),
            "rows": _text(self._trained), **state,
        }  # fmt: skip
        best = best_row(self._trained)
        self.checkpoints.save(state["step"], content, None if best is None else best["step"])

    def load(
        self, settings: Run, dataset_id: str, device: torch.device, warn: Callable[[str], None]
    ) -> dict[str, Any] | None:
        """The latest whole checkpoint, or None. One of other settings, data or format is refused by name."""
        state = self.checkpoints.latest(device, warn)
        if state is not None:
            self._check(state, settings, dataset_id)
        return state

    def result(self, device: torch.device, warn: Callable[[str], None]) -> dict[str, Any]:
        """The checkpoint that is the run's result: the best, where a part of train was held out, else the latest."""
        state = self.checkpoints.latest(device, warn)
        if state is None:
            raise UserError(f"{self} has no checkpoint yet; train it first")
        _, settings = self.settings()
        self._check(state, settings)
        best = best_row(rows_before(state))
        if best is not None and best["step"] != state["step"]:
            try:
                state = self.checkpoints.load(best["step"], device)
            except RunError as error:
                warn(f"{error}; it is that of the best epoch, {best['epoch']}: the latest is taken in its place")
            self._check(state, settings)
        return state

    def _check(self, state: dict[str, Any], settings: Run, dataset_id: str | None = None) -> None:
        self._check_format(state)
        self._refuse_other_settings(state["settings"], settings)
        if dataset_id not in (None, state["dataset_id"]):
            raise UserError(
                f"{self}: the run was trained on dataset {state['dataset_id'][:12]}, data.shards is now "
                f"{str(dataset_id)[:12]}; choose another --name"
            )

    def _check_format(self, state: dict[str, Any]) -> None:
        if state.get("format") != FORMAT:
            where = f"{self}: its checkpoints have format {state.get('format')}"
            raise UserError(f"{where}, this version reads {FORMAT}; choose another --name")

    def _refuse_other_settings(self, existing: dict[str, Any], settings: Run) -> None:
        """But for more epochs, where all that was trained would be the same with these from the start."""
        found = result_settings(settings)
        wanted = {name: value for name, value in found.items() if not name.startswith(settings.unused)}
        refuse_other_settings(self, existing, wanted, _hindrance(existing, wanted))

    def _read(self, name: str) -> bytes | None:
        """The content of a file; None where there is none."""
        try:
            with self.folder.open(name) as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None


def rows_before(state: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The rows of the epochs before a checkpoint."""
    return [] if state is None else _parsed(state["rows"].encode())


def _text(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _parsed(content: bytes) -> list[dict[str, Any]]:
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


def _step_of(line: bytes) -> float:
    """Of a row of a step; that of a killed process's last, of which only a part was written, is later than all."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except ValueError:
        return math.inf


def best_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the epoch with the highest val/top1 of a run's last stage, the earliest of equals.

    None where nothing was held out, or nothing is classified yet.
    """
    judged = [row for row in rows if "val/top1" in row and row.get("stage") == rows[-1].get("stage")]
    return max(judged, key=lambda row: row["val/top1"], default=None)


def result_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row that is a run's result: the best on the held-out part of train, where there is one, else the last."""
    return best_row(rows) or rows[-1]


def refuse_other_settings(
    where: object, existing: dict[str, Any], wanted: dict[str, Any], more_epochs: str | None = "are another run"
) -> None:
    """Refuse to go on in a folder whose result comes from settings that are not those wanted.

    Args:
        more_epochs: why another number of epochs alone is refused, too; None where it is not.
    """
    changed = [n for n in wanted if _plain(existing.get(n)) != _plain(wanted[n])]
    if changed == ["epochs"] and more_epochs is None:
        return
    if changed:
        shown = ", ".join(f"{n} {existing.get(n)} there, {wanted[n]} here" for n in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        why = f": {more_epochs}" if changed == ["epochs"] else ""
        raise UserError(f"{where} was started with other settings ({shown}{more}{why}); choose another --name")


def _hindrance(existing: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """Why a run cannot go on to another number of epochs; None where it can."""
    before, after, schedule = existing.get("epochs", 0), wanted["epochs"], wanted["optimizer.schedule"]
    warmup = wanted["optimizer.warmup_epochs"]
    if schedule not in EXTENDABLE:
        can = " or ".join(EXTENDABLE)
        return f"each step's rate depends on them under optimizer.schedule {schedule}; under {can}, more may follow"
    if after < before:
        return "more may follow, not fewer"
    if 2 * warmup >= before:
        return f"optimizer.warmup_epochs {warmup} takes half of a run at most, so the first steps depend on them"
    return "one fold begins where another ends" if wanted.get("folds") else None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
