"""The figures of a run's rows: what they are called, how a person reads them, and which of two is better."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

TITLES = {
    "loss": "loss", "top1": "top-1", "top5": "top-5", "nearest_center": "nearest centre", "recall_at_1": "Recall@1",
    "map_at_r": "MAP@R",
}  # fmt: skip
"""Those of every recipe. All but the loss are parts, which are shown per cent."""

SHORT = ("loss", "top1")
"""What is told of train, whose other figures say little."""
OF_CLASSES = ("top1_by_class", "confusion")
"""Lists, or None."""


def title(name: str) -> str:
    """Of "SPLIT/FIGURE"; a user's own figure is called by its name."""
    split, _, figure_name = name.partition("/")
    return f"{split} {TITLES.get(figure_name, figure_name)}"


def is_part(name: str) -> bool:
    return name.partition("/")[2] in TITLES and not name.endswith("loss")


def shown(name: str, value: float | None) -> str:
    """Per cent or four digits; "-" where the figure cannot be."""
    if value is None:
        return "-"
    return f"{value:.2%}" if is_part(name) else f"{value:.4f}"


def spread(name: str, values: Sequence[float]) -> str:
    """The mean of several, and their deviation as a sample's."""
    mean = shown(name, statistics.mean(values) if values else None)
    return f"{mean} ± {shown(name, statistics.stdev(values))}" if len(values) > 1 else mean


def figure(row: dict[str, Any], name: str) -> str:
    """A row's figure; "-" where there is none, too."""
    return shown(name, row.get(name))


def drawn(name: str, value: float | None) -> float:
    """As pictures have it: per cent or as it is, and a gap where the figure cannot be."""
    return math.nan if value is None else 100 * value if is_part(name) else value


def gain(name: str, value: float | None) -> float:
    """What is the higher the better: the figure, of a loss its negative; a figure that cannot be is the worst."""
    return -math.inf if value is None else -value if name.endswith("loss") else value


def told(row: dict[str, Any], split: str, names: Iterable[str]) -> str:
    """Those of the figures that a row has of a split, in words and numbers."""
    have = (name for name in names if f"{split}/{name}" in row)
    return " ".join(f"{TITLES.get(name, name)} {figure(row, f'{split}/{name}')}" for name in have)


def own_figures(row: dict[str, Any], split: str = "test") -> list[str]:
    """Names of the figures that a user's recipe adds to a row.

    Parts of the loss are not among them: those are in train, too. Nothing is said of a row without figures of train.
    """
    names = [name.partition("/")[2] for name in row if name.startswith(f"{split}/") and "train/loss" in row]
    single = [n for n in names if n not in OF_CLASSES and not isinstance(row[f"{split}/{n}"], list)]
    return [n for n in single if n not in TITLES and f"train/{n}" not in row]


@dataclass(frozen=True)
class Line:
    """A figure over epochs or steps."""

    label: str
    points: Sequence[tuple[float, float]]
    """(x, y), y not finite where there is none."""
    colour: int = 0
    faint: bool = False
    """One of several that another line stands for: it has no place in the legend."""


@dataclass(frozen=True)
class Panel:
    """Lines that are drawn together."""

    title: str
    lines: Sequence[Line]
    x: str = "epoch"
    unit: str = ""
    log: bool = False

    @property
    def name(self) -> str:
        return f"{self.title}{', ' * bool(self.unit)}{self.unit}{' (logarithmic)' * self.log}"

    def is_drawn(self, y: float) -> bool:
        return math.isfinite(y) and (y > 0 or not self.log)

    @property
    def is_empty(self) -> bool:
        return not any(self.is_drawn(y) for line in self.lines for _, y in line.points)
