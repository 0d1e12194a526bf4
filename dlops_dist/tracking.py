"""Listeners of a run: a console that shows it, and Weights & Biases."""

import netrc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlparse

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from dlops_dist.config import Settings
from dlops_dist.engine.events import EpochEnded, Event, Finished, Started, Stepped, Told, Warned
from dlops_dist.errors import UserError, first_line
from dlops_dist.files import Folder

PLAIN_EVERY_S = 10.0
WANDB_PROJECT = "dlops_dist"
WANDB_TIMEOUT_S = 30.0
WandbMode = Literal["online", "offline"]


class Console:
    """A live bar on a terminal, plain lines elsewhere. Use it as a context and call it with events."""

    def __init__(self) -> None:
        self._out = RichConsole(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._epochs = 0
        self._last_line = 0.0
        if self._out.is_terminal:
            columns = ("[bold]{task.description}", "{task.completed:.0f}/{task.total:.0f}", "{task.fields[figures]}")
            texts = [TextColumn(column) for column in columns]
            self._progress = Progress(texts[0], BarColumn(), *texts[1:], TimeRemainingColumn(), console=self._out)

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        self._out.print(text, markup=False)

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self._started(event)
            case Stepped():
                self._stepped(event)
            case EpochEnded():
                self.say(epoch_line(event.row, self._epochs))
                if self._progress is not None:
                    where = f"epoch {event.row['epoch']}/{self._epochs}"
                    self._progress.update(self._task, completed=event.row["step"], description=where)
            case Told():
                self.say(event.text)
            case Warned():
                self.warn(event.text)
            case Finished():
                if self._progress is not None:
                    self._progress.stop()

    def _started(self, event: Started) -> None:
        facts = event.facts
        self._epochs = event.epochs
        where = f" from step {event.first_step}" if event.first_step else ""
        length = f"of {event.steps // event.epochs}"
        if event.stages > 1:
            length = f"in {event.stages} stages, {event.steps}"
        images = f"{facts['train']:,} training" + (
            f", {facts['unlabeled']:,} unlabeled" if "unlabeled" in facts else ""
        )
        self.say(
            f"run {event.folder}{where}: {facts['parameters'] / 1e6:.1f} M parameters, {images} and "
            f"{facts['test']:,} test images of {facts['classes']} classes ({facts['dataset']}), "
            f"{facts['workers']} worker{'s' * (facts['workers'] > 1)} on {facts['device']}, "
            f"{event.epochs} epochs {length} steps"
        )
        if facts["workers"] > 1 and event.settings["model.norm"] == "local":
            self.warn("model.norm local: each worker normalises by its own samples; results depend on --workers")
        if self._progress is not None:
            self._progress.start()
            self._task = self._progress.add_task("starting", total=event.steps, completed=event.first_step, figures="")

    def _stepped(self, event: Stepped) -> None:
        top1 = "" if event.top1 is None else f"  top-1 {event.top1:.1%}"
        figures = f"loss {event.loss:.4f}{top1}  {event.images_per_s:,.0f} images/s"
        where = f"epoch {event.epoch}/{self._epochs}"
        if self._progress is not None:
            self._progress.update(self._task, completed=event.step, description=where, figures=figures)
            return
        now = time.monotonic()
        if now - self._last_line >= PLAIN_EVERY_S:
            self._last_line = now
            self.say(f"{where} step {event.step_in_epoch}/{event.steps_per_epoch}  {figures}")


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """An epoch's figures for a person."""
    stage = f"{row['stage']}  " if "stage" in row else ""
    train, val = (_split_figures(row, split) for split in ("train", "val"))
    return (
        f"epoch {row['epoch']}/{epochs}  {stage}{train}{val}test {test_figures(row)}  "
        f"{row['train_images_per_s']:,.0f} images/s  {row['epoch_s']:.1f} s"
    )


def _split_figures(row: dict[str, Any], split: str) -> str:
    """Loss and accuracy on a split; nothing for one that the run does not have."""
    top1 = f" top-1 {figure(row, f'{split}/top1')}" if f"{split}/top1" in row else ""
    return f"{split} loss {figure(row, f'{split}/loss')}{top1}  " if f"{split}/loss" in row else ""


def figure(row: dict[str, Any], name: str) -> str:
    """A loss or a part of a row; "-" where there is none, or none can be."""
    value = row.get(name)
    if value is None:
        return "-"
    return f"{value:.4f}" if name.endswith("loss") else f"{value:.2%}"


def test_figures(row: dict[str, Any]) -> str:
    """The test figures of a row, in words and numbers."""
    names = {
        "loss": "loss",
        "top-1": "top1",
        "top-5": "top5",
        "nearest-centre": "nearest_center",
        "Recall@1": "recall_at_1",
    }
    told = {title: name for title, name in names.items() if name == "loss" or "test/top1" in row}
    return " ".join(f"{title} {figure(row, f'test/{name}')}" for title, name in told.items())


def fold_figures(rows: Sequence[dict[str, Any]]) -> str | None:
    """Mean and standard deviation of the folds' last test accuracies; None where there are no folds."""
    last = {row["stage"]: row["test/top1"] for row in rows if row.get("stage", "").startswith("fold ")}
    if not last:
        return None
    deviation = statistics.stdev(last.values()) if len(last) > 1 else 0.0
    return f"top-1 of {len(last)} folds: mean {statistics.mean(last.values()):.2%} deviation {deviation:.2%}"


class Wandb:
    """Logs settings and every epoch's figures to Weights & Biases; a resumed run goes on as the same run there.

    Runs of one sweep are one group. Whatever W&B refuses is told by `warn`, and never stops the run.
    """

    def __init__(self, settings: Settings, warn: Callable[[str], None]) -> None:
        self._mode: WandbMode = "online" if settings.wandb == "online" else "offline"
        self._name, self._warn = str(settings.name), warn
        folder = Folder(settings.runs_dir) / self._name
        self._folder = folder.local or Path.cwd()
        self._run: Any = None

    def __call__(self, event: Event) -> None:
        try:
            self._log(event)
        except Exception as error:  # W&B raises many kinds; none is worth a run
            self._run = None
            _leave_out_wandb(error, self._warn)

    def _log(self, event: Event) -> None:
        match event:
            case Started():
                config = {**event.settings, **event.facts}
                self._run = _wandb_run(self._mode, self._folder, self._name, config, self._warn)
            case EpochEnded() if self._run is not None:
                figures = {k: v for k, v in event.row.items() if not isinstance(v, list)}
                self._run.log(figures, step=event.row["step"])
            case Finished() if self._run is not None:
                self._run.finish()


def log_pictures(mode: WandbMode, folder: Path, paths: Sequence[Path], warn: Callable[[str], None]) -> None:
    """Log pictures of a sweep as a run of its own in the sweep's group."""
    import wandb

    try:
        run = _wandb_run(mode, folder, "summary", {}, warn)
        run.log({path.stem: wandb.Image(str(path)) for path in paths})
        run.finish()
    except Exception as error:
        _leave_out_wandb(error, warn)


def _wandb_run(mode: WandbMode, folder: Path, name: str, config: dict[str, Any], warn: Callable[[str], None]) -> Any:
    """A run at W&B, in the group WANDB_RUN_GROUP if there is one; kept for later where the server refuses it."""
    import wandb

    run_id = "-".join(filter(None, (os.environ.get("WANDB_RUN_GROUP"), name)))
    settings = wandb.Settings(
        console="off", silent=True, init_timeout=WANDB_TIMEOUT_S, finish_timeout=WANDB_TIMEOUT_S,
        finish_timeout_raises=True,
    )  # fmt: skip
    try:
        return wandb.init(
            project=WANDB_PROJECT, name=name, id=run_id, resume="allow", dir=folder, config=config, mode=mode,
            settings=settings,
        )  # fmt: skip
    except wandb.Error as error:
        if mode == "offline":
            raise
        warn(f"wandb: {first_line(error)}; logged offline, and 'wandb sync {folder / 'wandb'}/offline-*' sends it")
        wandb.teardown()  # the name is in use till then
        return _wandb_run("offline", folder, name, config, warn)


def _leave_out_wandb(error: Exception, warn: Callable[[str], None]) -> None:
    import wandb

    warn(f"wandb: {first_line(error)}; nothing more is logged, 'wandb sync' sends what was")
    with suppress(Exception):  # else what is left of it fails once more when the process ends
        wandb.teardown()


def check_wandb(mode: str) -> None:
    """Refuse `online` where nobody is logged in, before anything is made."""
    if mode == "online" and not (os.environ.get("WANDB_API_KEY") or _key_in_netrc()):
        raise UserError("wandb: online needs a key; run 'wandb login', set WANDB_API_KEY, or pass --wandb offline")


def _key_in_netrc() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
