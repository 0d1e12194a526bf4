"""A sweep as tables."""

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from dlops_dist.config import Parameter, Point, Value
from dlops_dist.sweep.ranking import Ranked, importance


def ranking_table(
    title: str, parameters: Sequence[Parameter], ranked: Sequence[Ranked], limit: int | None = None
) -> Table:
    """The points, best first, with mean and deviation of their seeds. Nothing in it was measured on test.

    Args:
        limit: leave out those beyond so many.
    """
    table = Table(title=title)
    for column in ("", *(p.name for p in parameters), "epochs", "val top-1", "deviation", "seeds"):
        table.add_column(column, justify="right")
    table.add_column("", overflow="fold")
    for place, point in enumerate(ranked[:limit], 1):
        mean = "-" if point.mean is None else f"{point.mean:.2%}"
        deviation = "-" if point.deviation is None else f"{point.deviation:.2%}"
        values = [shown(point.point[p.name]) for p in parameters]
        seeds = f"{len(point.scores)}/{len(point.trials)}"
        table.add_row(str(place), *values, str(point.epochs), mean, deviation, seeds, _remark(point))
    if limit is not None and len(ranked) > limit:
        table.add_row("...", *[""] * (len(parameters) + 4), f"{len(ranked) - limit} more")
    return table


def importance_table(parameters: Sequence[Parameter], ranked: Sequence[Ranked]) -> Table:
    """How much of the accuracy's variance over the points each parameter explains on its own."""
    finished = sum(point.finished for point in ranked)
    table = Table("parameter", "explains alone", "best at", title=f"variance of val top-1 over {finished} points")
    for parameter in parameters:
        part = importance(parameter, ranked)
        best = shown(ranked[0].point[parameter.name])
        table.add_row(parameter.name, "too few points to say" if part is None else f"{part:.0%}", best)
    return table


def described(point: Point) -> str:
    return ", ".join(f"{name} {shown(value)}" for name, value in point.items())


def shown(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _remark(point: Ranked) -> str:
    failed = [trial.failed for trial in point.trials if trial.failed]
    if failed:
        return escape(f"failed: {failed[0]}")
    return "stopped early" if any(trial.stopped for trial in point.trials) else "" if point.finished else "unfinished"
