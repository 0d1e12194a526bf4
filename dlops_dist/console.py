"""What a person sees of a run: a console that shows it, and its figures in words and numbers."""

import statistics
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from dlops_dist.engine.events import EpochEnded, Event, Finished, Started, Stepped, Told, Warned

PLAIN_EVERY_S = 10.0


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
        if facts["workers"] > 1 and facts["local_norm"]:
            self.warn(
                f"the model's batch norm {facts['local_norm']} looks at each worker's own samples (model.norm local): "
                f"results depend on --workers"
            )
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
