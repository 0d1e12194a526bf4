"""The page of a sweep: its points, best first, how each learnt, and what the parameters had to do with it."""

import statistics
from collections.abc import Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from dlops_dist.config.sweep import word
from dlops_dist.figures import Line, Panel, drawn, is_part, shown, title
from dlops_dist.report import charts
from dlops_dist.report.page import Section, page, tables_beside, told
from dlops_dist.sweep.board import described, importance_table, ranking_table
from dlops_dist.sweep.folder import Ranked, SweepFolder
from dlops_dist.tables import html

CAPTIONS = {
    "parallel": "A line for each point, from its parameters to its figure; the best point is thick",
    "responses": "The figure along each parameter, with the deviation over seeds; the best point is a star",
}
CURVES = 40
"""Points at most whose learning is drawn."""


def sweep_page(folder: SweepFolder, ranked: Sequence[Ranked], pictures: dict[str, bytes], stem: str) -> str:
    """The whole page.

    Args:
        pictures: PNG files, by their names.
        stem: the page's own name.
    """
    sweep, best = folder.sweep, ranked[0]
    figure = sweep.choose_by
    drawings = "".join(charts.picture(name, CAPTIONS[name], png, "plot") for name, png in pictures.items())
    return page(
        folder.path.name,
        told(_said(sweep, ranked)) + tables_beside(stem),
        [
            Section("Ranking", html(ranking_table(folder, ranked))),
            Section("What each parameter explains", html(importance_table(sweep, ranked))),
            Section("How the points learnt", _learning(ranked, figure) if best.epochs > 1 else ""),
            Section("Where the points lie", drawings),
            Section("Runs", _runs(folder, ranked)),
        ],
    )


def _said(sweep: Any, ranked: Sequence[Ranked]) -> list[str]:
    figure, best, finished = sweep.choose_by, ranked[0], sum(point.finished for point in ranked)
    found = [
        f"{finished} of {len(ranked)} points are finished. They are compared by {title(figure)} on a part held out of "
        f"train; nothing here was measured on test.",
        f"The best point is {described(best.point)}: {title(figure)} {shown(figure, best.mean)}.",
    ]
    if len(ranked) > 1 and ranked[1].mean is not None and best.mean is not None:
        text = f"The next one has {shown(figure, ranked[1].mean)}."
        if len(best.scores) < 2:
            text += " With one seed for each point, how far that is chance is not known."
        found.append(text)
    found.append("The best of many is a little lucky: trained anew, or on test, expect a little less of it.")
    return found


def _learning(ranked: Sequence[Ranked], name: str) -> str:
    """The mean of each point's seeds, epoch by epoch; the best in colour."""
    lines = []
    for place, point in reversed(list(enumerate(ranked[:CURVES]))):
        scores = [trial.scores[: point.epochs] for trial in point.trials]
        means = [[score for score in of if score is not None] for of in zip(*scores, strict=True)]
        points = [(n, drawn(name, statistics.mean(of) if of else None)) for n, of in enumerate(means, 1)]
        lines.append(Line(f"{place + 1}: {described(point.point)}", points, place, faint=place > 0))
    left_out = f", the best {CURVES} points" if len(ranked) > CURVES else ""
    unit = "%" if is_part(name) else ""
    drawing = charts.chart(Panel(f"{title(name)} of each point{left_out}, the best one thick", lines, unit=unit))
    return f"<div class=alone>{drawing}</div>"


def _runs(folder: SweepFolder, ranked: Sequence[Ranked]) -> str:
    """Each point's folders, linked to their pages where these are there."""
    items = []
    for place, point in enumerate(ranked, 1):
        names = []
        for trial in point.trials:
            page_there = (folder.path / trial.name / "report" / "index.html").is_file()
            name = f"{escape(trial.name)} (seed {trial.seed})"
            target = f"../{quote(trial.name)}/report/index.html"
            names.append(f"<a href='{escape(target)}'>{name}</a>" if page_there else name)
        values = ", ".join(f"{name} {word(value)}" for name, value in point.point.items())
        items.append(f"<li>{place}: {escape(values)}<br><span class=soft>{', '.join(names)}</span></li>")
    return f"<ul class=plain>{''.join(items)}</ul>"


def sweep_records(folder: SweepFolder, ranked: Sequence[Ranked]) -> list[dict[str, Any]]:
    """Each point's figures, as they are, for programs."""
    return [
        {
            "place": place, **point.point, "epochs": point.epochs, folder.sweep.choose_by: point.mean,
            "deviation": point.deviation, "seeds": " ".join(str(trial.seed) for trial in point.trials),
            "runs": " ".join(trial.name for trial in point.trials),
        }
        for place, point in enumerate(ranked, 1)
    ]  # fmt: skip
