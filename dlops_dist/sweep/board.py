"""What a person sees of a sweep: the ranking as it goes on, and in the end tables, pictures and a line."""

import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from dlops_dist.config import Point, Sweep
from dlops_dist.config.sweep import word
from dlops_dist.console import Lines
from dlops_dist.engine.run_folder import RunFolder
from dlops_dist.figures import shown, title
from dlops_dist.sweep.folder import Ranked, SweepFolder, importance, note_end

SHOWN_POINTS = 30


class Board(Lines):
    """The ranking so far, live on a terminal; plain lines elsewhere. Use it as a context."""

    live: Live | None

    def __init__(self, folder: SweepFolder) -> None:
        super().__init__()
        self._folder = folder
        if self.out.is_terminal:
            self.live = Live(console=self.out, auto_refresh=False, transient=True)

    def started(self, name: str) -> None:
        trial = self._folder.trial(name)
        self._tell(f"{name} starts: {described(trial.point)}, seed {trial.seed}")

    def judged(self, name: str) -> None:
        """A trial ended an epoch."""
        trial, figure = self._folder.trial(name), self._folder.sweep.choose_by
        score = f"{title(figure)} {shown(figure, trial.scores[-1])}"
        self._tell(f"{name} epoch {len(trial.scores)}/{trial.epochs}: {score}")

    def ended(self, name: str, died: str | None = None) -> None:
        """A trial finished, failed, was given up by the scheduler, or its own process died."""
        trial = self._folder.trial(name)
        if died or not (trial.finished or trial.failed):
            note_end(self._folder.path / name, failed=died, stopped=died is None)
            trial = self._folder.trial(name)
        if trial.failed:
            self.warn(f"{name} failed: {trial.failed}")
        self._tell(f"{name} ends at epoch {len(trial.scores)}{', given up by the scheduler' * trial.stopped}")

    def _tell(self, text: str) -> None:
        if self.live is None:
            self.say(text)
            return
        self.live.start()
        self.live.update(ranking_table(self._folder, self._folder.ranking(), SHOWN_POINTS), refresh=True)


def summarize(folder: SweepFolder, out: Console) -> Ranked | None:
    """Print the ranking and what it says, draw it, and return the best point; None where none has a figure yet."""
    from dlops_dist import draw

    ranked = folder.ranking()
    out.print(ranking_table(folder, ranked))
    if not ranked or ranked[0].mean is None:
        return None
    out.print(importance_table(folder.sweep, ranked))
    for path in draw.sweep(folder.path / "report", folder.sweep.parameters, folder.sweep.choose_by, ranked):
        out.print(f"drawn: {path}", markup=False)
    return ranked[0]


def best_line(folder: SweepFolder, best: Ranked) -> str:
    """The best point and its test figures: those of its runs' last epochs, read here for the first and only time."""
    val = folder.sweep.choose_by
    test = val.replace("val/", "test/", 1)
    rows = [RunFolder(folder.path / trial.name).rows()[-1] for trial in best.trials if trial.scores]
    tested = [row[test] for row in rows if row.get(test) is not None]
    seeds = f"mean of {len(rows)} seeds" if len(rows) > 1 else "one seed"
    return f"{described(best.point)}: {_spread(val, best.scores)}, {_spread(test, tested)} ({seeds})"


def _spread(name: str, figures: Sequence[float]) -> str:
    mean = shown(name, statistics.mean(figures) if figures else None)
    return f"{title(name)} {mean}" + (f" ± {shown(name, statistics.stdev(figures))}" if len(figures) > 1 else "")


def ranking_table(folder: SweepFolder, ranked: Sequence[Ranked], limit: int | None = None) -> Table:
    """The points, best first, with mean and deviation of their seeds. Nothing in it was measured on test.

    Args:
        limit: leave out those beyond so many.
    """
    searched, figure = [parameter.name for parameter in folder.sweep.parameters], folder.sweep.choose_by
    table = Table(title=f"{folder.path.name}: points, best first")
    for column in ("", *searched, "epochs", title(figure), "deviation", "seeds"):
        table.add_column(column, justify="right")
    table.add_column("", overflow="fold")
    for place, point in enumerate(ranked[:limit], 1):
        values = [word(point.point[name]) for name in searched]
        spread = shown(figure, point.mean), shown(figure, point.deviation)
        seeds = f"{len(point.scores)}/{len(point.trials)}"
        table.add_row(str(place), *values, str(point.epochs), *spread, seeds, _remark(point))
    if limit is not None and len(ranked) > limit:
        table.add_row("...", *[""] * (len(searched) + 4), f"{len(ranked) - limit} more")
    return table


def importance_table(sweep: Sweep, ranked: Sequence[Ranked]) -> Table:
    """How much of the figure's variance over the points each parameter explains on its own."""
    over = f"variance of {title(sweep.choose_by)} over {sum(point.finished for point in ranked)} points"
    table = Table("parameter", "explains alone", "best at", title=over)
    for parameter in sweep.parameters:
        part = importance(parameter, ranked)
        best = word(ranked[0].point[parameter.name])
        table.add_row(parameter.name, "too few points to say" if part is None else f"{part:.0%}", best)
    return table


def described(point: Point) -> str:
    return ", ".join(f"{name} {word(value)}" for name, value in point.items())


def _remark(point: Ranked) -> str:
    failed = [trial.failed for trial in point.trials if trial.failed]
    if failed:
        return escape(f"failed: {failed[0]}")
    return "stopped early" if any(trial.stopped for trial in point.trials) else "" if point.finished else "unfinished"
