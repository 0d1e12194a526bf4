"""The folder of a run: its settings, its rows of metrics, its checkpoints."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import takewhile
from pathlib import Path, PurePath
from typing import Any

import torch
import yaml

from dlops_dist.config import SHIPPED, Run, common_settings, is_loaded, load_recipe, result_settings
from dlops_dist.config.yaml_file import parse_yaml
from dlops_dist.data.shards import Manifest, read_manifest
from dlops_dist.engine.checkpoints import ANEW, Checkpoints
from dlops_dist.engine.lease import LEASE, lease, owner, taken_over, unwritable
from dlops_dist.engine.resume import hindrance, refuse_other_settings
from dlops_dist.engine.rows import best_row, is_out_of_patience, parsed, rows_before, step_of, text_of, timeless
from dlops_dist.errors import RunError, UserError
from dlops_dist.files import Folder, locked, make_writable

FORMAT = 3
CONFIG, METRICS, STEPS = "config.yaml", "metrics.jsonl", "steps.jsonl"
STATE_SIZE = 3
"""A checkpoint is so many times its weights at most: momenta and an average come with them."""
CPU = torch.device("cpu")


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
        self._owner: str | None = None

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
        config = self.read(CONFIG)
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
        except Exception as error:
            raise unwritable(self.folder, error) from None

    @contextmanager
    def locked(self, tell: Callable[[str], None] = lambda text: None) -> Iterator[None]:
        """Keep other processes, of this machine and of others, from training the same run.

        One that is refused before anything was trained leaves no folder.
        """
        path = self.folder.local
        with ExitStack() as stack:
            if path is not None:
                make_writable(path, "runs_dir", "choose another --runs-dir")
                stack.enter_context(locked(path, "trained"))
                stack.callback(_remove_empty, path)
            stack.enter_context(lease(self.folder, tell))
            try:
                yield
            except UserError:
                if self.folder.names() == [CONFIG, LEASE] and not self.checkpoints.steps():
                    self.folder.delete(CONFIG)
                raise

    def check_room(self, model: torch.nn.Module, checkpoints: int) -> None:
        """Refuse a disk that will be full before so many checkpoints of a model are written."""
        path = self.folder.local
        if path is None:
            return
        at_once = min(self.checkpoints.kept + 2, checkpoints)  # the best, and one being written
        needed = sum(p.numel() * p.element_size() for p in model.parameters()) * STATE_SIZE * at_once
        free = shutil.disk_usage(path).free
        if free < needed:
            raise UserError(
                f"runs_dir: {path} has {free / 1e9:.2f} GB free, its checkpoints need {needed / 1e9:.2f} GB; make "
                f"room, or choose another --runs-dir"
            )

    def note_owner(self) -> None:
        """Write for whoever owns the run now, and for nobody else."""
        self._owner = owner(self.folder)

    def _check_owner(self) -> None:
        if owner(self.folder) != self._owner:
            raise RunError(taken_over(self.folder))

    def settings(self) -> tuple[str, Run]:
        """Recipe and settings that the run was trained with last; of a user's that this process has not been pointed
        to, those settings that every run has: nothing in the folder is executed.
        """
        where, content = self.folder / CONFIG, self.read(CONFIG)
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
        content, damage = self.read(METRICS), ""
        try:
            if content:
                return parsed(content)
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
        is_over = is_out_of_patience(rows_before(state), settings)
        if state["epoch"] < settings.total_epochs(manifest.num_folds) and not is_over:
            return None
        self.restore_rows(state, warn)
        return rows_before(state)[-1]

    def restore_rows(self, state: dict[str, Any] | None, warn: Callable[[str], None]) -> None:
        """Let metrics.jsonl hold the rows before the checkpoint that the run goes on from, and no others."""
        wanted, content = rows_before(state), self.read(METRICS) or b""
        try:
            there = parsed(content)
        except ValueError:
            there = []
        own, later = there[: len(wanted)], len(there) - len(wanted)
        intact = timeless(own) == timeless(wanted) and content.startswith(text_of(own).encode())
        self._trained = own if intact else wanted
        if not intact or later:
            self.folder.write_text(METRICS, text_of(self._trained))
            where = self.folder / METRICS
            if intact:
                warn(f"{where}: its last {later} rows are in no checkpoint; the run goes on from before them")
            else:
                warn(f"{where} was missing or damaged; its {len(wanted)} rows are those of the checkpoint")
        self._keep_steps(0 if state is None else state["step"])

    def _keep_steps(self, last_step: int) -> None:
        """Drop the rows of steps that are later than the checkpoint."""
        lines = (self.read(STEPS) or b"").splitlines(keepends=True)
        kept = list(takewhile(lambda line: step_of(line) <= last_step, lines))
        if len(kept) < len(lines):
            self.folder.write(STEPS, lambda file: file.writelines(kept))

    def add_steps(self, rows: Sequence[dict[str, Any]]) -> None:
        """Rows of steps that were logged, after those that are there."""
        self._check_owner()
        with _mended_by_hand():
            self.folder.append(STEPS, text_of(rows))

    def add_row(self, row: dict[str, Any]) -> None:
        """That of an epoch whose checkpoint follows; the checkpoint before is safe by then."""
        self.checkpoints.wait()
        self._check_owner()
        self._trained.append(row)
        with _mended_by_hand():
            self.folder.write_text(METRICS, text_of(self._trained))

    def save(self, settings: Run, state: dict[str, Any]) -> None:
        """Write the checkpoint of state["step"], beside the steps that follow."""
        self._check_owner()
        content = {
            "format": FORMAT, "settings": result_settings(settings), "threads": torch.get_num_threads(),
            "rows": text_of(timeless(self._trained)), **state,
        }  # fmt: skip
        best = best_row(self._trained, settings.choose_by)
        self.checkpoints.save(state["step"], content, None if best is None else best["step"])

    def load(
        self, settings: Run, dataset_id: str, device: torch.device, warn: Callable[[str], None]
    ) -> dict[str, Any] | None:
        """The latest whole checkpoint, or None: the same on every rank. Other settings, data or format are refused."""
        state = self.checkpoints.latest_of_all_ranks(device, warn)
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
        best = best_row(rows_before(state), settings.choose_by)
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
        refuse_other_settings(self, existing, wanted, hindrance(existing, wanted))

    def read(self, name: str) -> bytes | None:
        """The content of a file; None where there is none."""
        try:
            with self.folder.open(name) as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # something is in it
        folder.rmdir()


@contextmanager
def _mended_by_hand() -> Iterator[None]:
    """A full disk ends a run: whoever starts it again would only meet it again."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{error.filename}: {error.strerror}; mend that, then the same command goes on") from error
