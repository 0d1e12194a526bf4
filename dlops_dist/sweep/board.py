"""What a person sees of a sweep: the ranking as it goes on, and in the end tables and a line."""

from collections.abc import Sequence

from rich.console import Group
from rich.live import Live

from dlops_dist.config import Point, Sweep
from dlops_dist.config.sweep import word
from dlops_dist.console import Lines
from dlops_dist.engine.run_folder import RunFolder
from dlops_dist.figures import shown, spread, title
from dlops_dist.sweep.folder import Ranked, SweepFolder, importance, note_end
from dlops_dist.tables import Table, on_terminal

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
        table = ranking_table(self._folder, self._folder.ranking(), SHOWN_POINTS)
        self.live.update(Group(*on_terminal(table, self.out.width)), refresh=True)


def best_line(folder: SweepFolder, best: Ranked) -> str:
    """The best point and its test figures: those of its runs' last epochs, read here for the first and only time."""
    val = folder.sweep.choose_by
    test = val.replace("val/", "test/", 1)
    rows = [RunFolder(folder.path / trial.name).rows()[-1] for trial in best.trials if trial.scores]
    tested = [row[test] for row in rows if row.get(test) is not None]
    seeds = f"mean of {len(rows)} seeds" if len(rows) > 1 else "one seed"
    figures = (f"{title(name)} {spread(name, values)}" for name, values in ((val, best.scores), (test, tested)))
    return f"{described(best.point)}: {', '.join(figures)} ({seeds})"


def ranking_table(folder: SweepFolder, ranked: Sequence[Ranked], limit: int | None = None) -> Table:
    """The points, best first, with mean and deviation of their seeds. Nothing in it was measured on test.

    Args:
        limit: leave out those beyond so many.
    """
    searched, figure = [parameter.name for parameter in folder.sweep.parameters], folder.sweep.choose_by
    columns = ["", *searched, "epochs", title(figure), "deviation", "seeds", ""]
    rows = [
        [str(place), *(word(point.point[name]) for name in searched), str(point.epochs), shown(figure, point.mean),
         shown(figure, point.deviation), f"{len(point.scores)}/{len(point.trials)}", _remark(point)]
        for place, point in enumerate(ranked[:limit], 1)
    ]  # fmt: skip
    if limit is not None and len(ranked) > limit:
        rows.append(["...", *[""] * (len(searched) + 4), f"{len(ranked) - limit} more"])
    return Table(f"{folder.path.name}: points, best first", columns, rows, remarks=True)


def importance_table(sweep: Sweep, ranked: Sequence[Ranked]) -> Table:
    """How much of the figure's variance over the points each parameter explains on its own."""
    over = f"variance of {title(sweep.choose_by)} over {sum(point.finished for point in ranked)} points"
    rows = []
    for parameter in sweep.parameters:
        part = importance(parameter, ranked)
        best = word(ranked[0].point[parameter.name])
        rows.append([parameter.name, "too few points to say" if part is None else f"{part:.0%}", best])
    return Table(over, ["parameter", "explains alone", "best at"], rows)


def described(point: Point) -> str:
    return ", ".join(f"{name} {word(value)}" for name, value in point.items())


def _remark(point: Ranked) -> str:
    failed = [trial.failed for trial in point.trials if trial.failed]
    if failed:
        return f"failed: {failed[0]}"
    return "stopped early" if any(trial.stopped for trial in point.trials) else "" if point.finished else "unfinished"
