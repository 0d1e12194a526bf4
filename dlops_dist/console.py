"""What a person sees of a run: a console that shows it, and its figures in words and numbers."""

import statistics
import time
from collections.abc import Sequence
from textwrap import fill
from typing import Any, Self

from rich.console import Console as RichConsole
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from dlops_dist.events import EpochEnded, Event, Started, Stepped, Told, Warned
from dlops_dist.figures import SHORT, TITLES, own_figures, told

PLAIN_EVERY_S = 10.0
AT_WORDS: dict[str, Any] = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
WIDE, WIDE_BAR, NARROW_BAR = 100, 20, 10
"""Characters of a terminal with room for all that is told beside a bar, and of the bar there and on others."""


class Lines:
    """Lines of text, and on a terminal something live below them. Use it as a context."""

    def __init__(self, quiet: bool = False) -> None:
        self.out = RichConsole(highlight=False, emoji=False, soft_wrap=True, quiet=quiet)
        self.live: Progress | Live | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, text: str) -> None:
        """A line of its own; on a terminal several, where it is narrow, that begin at words."""
        if self.out.is_terminal:
            text = "\n".join(fill(line, self.out.width, **AT_WORDS) for line in text.splitlines())
        self.out.print(text, markup=False)

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")


class Console(Lines):
    """A run: a live bar on a terminal, plain lines elsewhere. Call it with events."""

    live: Progress | None

    def __init__(self, quiet: bool = False) -> None:
        super().__init__(quiet)
        self._task = TaskID(0)
        self._epochs = 0
        self._last_line = 0.0
        if self.out.is_terminal and not quiet:
            where, number, figures = (
                TextColumn(text, table_column=Column(no_wrap=True))
                for text in (
                    "[bold]{task.description}",
                    "{task.completed:.0f}/{task.total:.0f}",
                    "{task.fields[figures]}",
                )
            )
            bar = BarColumn(NARROW_BAR if self._is_narrow else WIDE_BAR)
            after = [figures] if self._is_narrow else [number, figures]
            self.live = Progress(where, bar, *after, TimeRemainingColumn(), console=self.out)

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self._started(event)
            case Stepped():
                self._stepped(event)
            case EpochEnded():
                self.say(epoch_line(event.row, self._epochs))
                self._move(event.row["epoch"], event.row["step"])
            case Told():
                self.say(event.text)
            case Warned():
                self.warn(event.text)

    @property
    def _is_narrow(self) -> bool:
        return self.out.width < WIDE

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
        blocks = f"{facts['blocks']} block{'s' * (facts['blocks'] > 1)} a batch"
        self.say(f"exactness: {facts['exactness']} ({blocks})")
        if self.live is not None:
            self.live.start()
            self._task = self.live.add_task("starting", total=event.steps, completed=event.first_step, figures="")

    def _stepped(self, event: Stepped) -> None:
        top1 = "" if event.top1 is None else f"  top-1 {event.top1:.1%}"
        figures, speed = f"loss {event.loss:.4f}{top1}", f"  {event.images_per_s:,.0f} images/s"
        where = self._move(event.epoch, event.step, figures=figures + speed * (not self._is_narrow))
        now = time.monotonic()
        if self.live is None and now - self._last_line >= PLAIN_EVERY_S:
            self._last_line = now
            self.say(f"{where} step {event.step_in_epoch}/{event.steps_per_epoch}  {figures}{speed}")

    def _move(self, epoch: int, step: int, **shown: Any) -> str:
        """Let the bar show where the run is; returns that in words."""
        where = f"epoch {epoch}/{self._epochs}"
        if self.live is not None:
            self.live.update(self._task, completed=step, description=where, **shown)
        return where


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """An epoch's figures for a person."""
    parts = [f"epoch {row['epoch']}/{epochs}", *([row["stage"]] if "stage" in row else [])]
    for split, names in (("train", SHORT), ("val", [*SHORT, *own_figures(row, "val")])):
        parts += [f"{split} {figures}"] if (figures := told(row, split, names)) else []
    speed = f"{row['train_images_per_s']:,.0f} images/s  {row['epoch_s']:.1f} s"
    return "  ".join([*parts, f"test {test_figures(row)}", speed])


def test_figures(row: dict[str, Any]) -> str:
    """The test figures of a row, in words and numbers."""
    return told(row, "test", [*TITLES, *own_figures(row)])


def fold_figures(rows: Sequence[dict[str, Any]]) -> str | None:
    """Mean and standard deviation of the folds' last test accuracies; None where there are no folds."""
    last = {row["stage"]: row["test/top1"] for row in rows if row.get("stage", "").startswith("fold ")}
    if not last:
        return None
    deviation = statistics.stdev(last.values()) if len(last) > 1 else 0.0
    return f"top-1 of {len(last)} folds: mean {statistics.mean(last.values()):.2%} deviation {deviation:.2%}"
