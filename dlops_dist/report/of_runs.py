"""The page of several runs: what differs between them, their results with the spread over seeds, their curves."""

import os
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from dlops_dist.files import is_url
from dlops_dist.report import charts, compared
from dlops_dist.report.page import Section, page, tables_beside, told
from dlops_dist.report.panels import overlaid
from dlops_dist.report.runs import Group
from dlops_dist.tables import Table, html

CLASSES = 30
"""At most, of which each is compared."""


def runs_page(groups: Sequence[Group], place: str, stem: str) -> str:
    """The whole page.

    Args:
        place: where it will lie, for links to the runs' own.
        stem: its own name there.
    """
    own = "".join(map(html, filter(None, (difference_settings(groups),))))
    found = compared.difference_table(compared.differences(groups))
    return page(
        f"{sum(len(group.runs) for group in groups)} runs",
        told(compared.sentences(groups) if len(groups) > 1 else []) + tables_beside(stem),
        [
            Section("Results", html(compared.table(groups)) + _spread_note(groups)),
            Section("Differences", html(found) if found else ""),
            Section("What differs", own),
            Section("By epoch", charts.grid(map(charts.chart, overlaid(groups)))),
            Section("Classes", "".join(map(html, filter(None, (_by_class(groups),))))),
            Section("Runs", _links(groups, place)),
        ],
    )


def _spread_note(groups: Sequence[Group]) -> str:
    if all(len(group.runs) == 1 for group in groups):
        return ""
    return "<p class=soft>Mean ± standard deviation over seeds.</p>"


def difference_settings(groups: Sequence[Group]) -> Table | None:
    """Settings, and data, that are not the same in all."""
    own = [{**group.first.own, "data set": group.first.facts.get("dataset", group.first.data)} for group in groups]
    names = [n for n in dict.fromkeys(n for values in own for n in values) if len({str(v.get(n)) for v in own}) > 1]
    rows = [[name, *(str(values.get(name, "-")) for values in own)] for name in names]
    return Table("", ["setting", *(group.label for group in groups)], rows) if rows else None


def _by_class(groups: Sequence[Group]) -> Table | None:
    """Accuracies of each class, where the classes are the same."""
    lists = {
        group.label: [of for run in group.runs.values() if (of := run.result.get("test/top1_by_class"))]
        for group in groups
    }
    lists = {label: of for label, of in lists.items() if of}
    numbers = {len(of) for own in lists.values() for of in own}
    if len({group.first.data for group in groups}) > 1 or len(numbers) != 1 or (number := numbers.pop()) > CLASSES:
        return None
    named = next(group.first for group in groups if group.label in lists)
    rows = []
    for place, name in enumerate(compared.class_names(named, number)):
        means = [[of[place] for of in own if of[place] is not None] for own in lists.values()]
        rows.append([name, *(f"{statistics.mean(values):.1%}" if values else "-" for values in means)])
    return Table("test top-1 of each class, mean over seeds", ["class", *lists], rows)


def _links(groups: Sequence[Group], place: str) -> str:
    """To the runs' own pages, where these lie on the same machine."""
    items = []
    for run in (run for group in groups for run in group.runs.values()):
        name, target = escape(run.name), Path(run.place) / "report" / "index.html"
        if target.is_file() and not is_url(place):
            name = f"<a href='{escape(quote(os.path.relpath(target, place)))}'>{name}</a>"
        items.append(f"<li>{name} <span class=soft>{escape(run.place)}</span></li>")
    return f"<ul>{''.join(items)}</ul>"
