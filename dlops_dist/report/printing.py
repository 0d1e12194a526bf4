"""Tables for whoever called: people, or programs."""

import csv
import io
import json
import sys
from collections.abc import Sequence
from typing import Any, Literal

from rich.console import Console

from dlops_dist.tables import Table, markdown, on_terminal

PIPED_WIDTH = 160
Kind = Literal["table", "md", "csv", "json"]
Record = dict[str, Any]


class Printed:
    """Prints tables in the form that is wanted, and what else is to be known where it is in nobody's way."""

    def __init__(self, kind: Kind = "table", console: Console | None = None) -> None:
        width = None if sys.stdout.isatty() else PIPED_WIDTH
        self._kind, self._console = kind, console or Console(width=width, highlight=False, emoji=False)

    def tables(self, tables: Sequence[Table], records: Sequence[Record], sentences: Sequence[str] = ()) -> None:
        match self._kind:
            case "table":
                for table in tables:
                    self._console.print(*on_terminal(table, self._console.width))
                for sentence in sentences:
                    self._console.print(sentence, markup=False)
            case "md":
                print(as_markdown(tables, sentences), end="")
            case "csv":
                print(as_csv(records), end="")
            case "json":
                print(json.dumps(records, indent=1))

    def say(self, text: str) -> None:
        if self._kind == "table":
            self._console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr)

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)


def as_markdown(tables: Sequence[Table], sentences: Sequence[str]) -> str:
    return "\n".join([*map(markdown, tables), *(f"{sentence}\n" for sentence in sentences)])


def as_csv(records: Sequence[Record]) -> str:
    """A line for each record, with all the names that any of them has; lists are left out."""
    names = dict.fromkeys(name for record in records for name, value in record.items() if not isinstance(value, list))
    content = io.StringIO()
    writer = csv.DictWriter(content, list(names), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return content.getvalue()
