"""Tables as text: on a terminal as wide as it is, as Markdown, as HTML."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

BORDERS = 3
"""Characters between two columns on a terminal; one more at the end."""


@dataclass(frozen=True)
class Table:
    """Cells as a person reads them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    named: int = 1
    """So many columns say what a row is of: they stand on the left, and again where a table is cut."""
    beside: frozenset[int] = frozenset()
    """Rows that are not ours."""
    remarks: bool = False
    """Whether the last column is text, which may go over several lines."""


def on_terminal(table: Table, width: int) -> Iterator[Any]:
    """Tables of rich's, one below the other where the columns do not fit beside each other: no word is cut.

    A word that is wider than half of the terminal is folded.
    """
    from rich.table import Table as RichTable
    from rich.text import Text

    last = len(table.columns) - 1 if table.remarks else -1
    least, most = [], []
    for place, header in enumerate(table.columns):
        cells = [row[place] for row in table.rows]
        words = [word for cell in cells for word in (cell.split() if place == last else [cell])]
        least.append(min(max(map(len, [*header.split(), *words, "-"])), width // 2))
        most.append(max(map(len, [header, *cells])))
    for number, places in enumerate(_cut(least, table.named, width)):
        shown = RichTable(title=f"{table.title}{', further columns' * (number > 0)}")
        spare = width - 1 - sum(least[place] + BORDERS for place in places)
        for place in places:
            more = min(max(most[place] - least[place], 0), max(spare, 0))
            spare -= more
            side: Any = "left" if place < table.named or place == last else "right"
            heading = Text(table.columns[place])
            shown.add_column(heading, justify=side, width=least[place] + more, overflow="fold")
        for line, row in enumerate(table.rows):
            shown.add_row(*(Text(row[place]) for place in places), style="dim" if line in table.beside else None)
        yield shown


def _cut(least: Sequence[int], named: int, width: int) -> list[list[int]]:
    """Which columns stand beside each other: those that name the rows, and as many others as fit, one at least."""
    names, parts = list(range(named)), [list(range(named))]
    for place in range(named, len(least)):
        needed = 1 + sum(least[p] + BORDERS for p in [*parts[-1], place])
        if needed > width and len(parts[-1]) > named:
            parts.append(list(names))
        parts[-1].append(place)
    return parts


def markdown(table: Table) -> str:
    sides = ["--:" if _side(place, table) else ":--" for place in range(len(table.columns))]
    lines = [table.columns, sides, *table.rows]
    body = "\n".join(f"| {' | '.join(map(plain, line))} |" for line in lines)
    return f"**{plain(table.title)}**\n\n{body}\n"


def plain(text: str) -> str:
    """Text that Markdown leaves as it is in a cell."""
    return escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


def html(table: Table) -> str:
    """One that scrolls on its own where it is wider than the page."""
    heads = "".join(f"<th{_side(place, table)}>{escape(name)}</th>" for place, name in enumerate(table.columns))
    lines = "".join(
        f"<tr{' class=beside' * (line in table.beside)}>"
        + "".join(f"<td{_side(place, table)}>{escape(cell)}</td>" for place, cell in enumerate(row))
        + "</tr>"
        for line, row in enumerate(table.rows)
    )
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    return f"<div class=scrolls><table>{caption}<thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>"


def _side(place: int, table: Table) -> str:
    is_text = place < table.named or (table.remarks and place == len(table.columns) - 1)
    return "" if is_text else " class=number"
