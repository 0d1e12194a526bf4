"""What figures of several runs say, and what they do not: means over seeds, paired differences, sentences."""

import math
import statistics
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

from dlops_dist.console import fold_figures
from dlops_dist.figures import SHORT, TITLES, figure, is_part, own_figures, shown, spread, title
from dlops_dist.report.runs import Group, Reported
from dlops_dist.tables import Table

BESIDE = "original study, 10 epochs"
QUANTILES = (
    12.70620, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814,
    2.20099, 2.17881, 2.16037, 2.14479, 2.13145, 2.11991, 2.10982, 2.10092, 2.09302, 2.08596,
    2.07961, 2.07387, 2.06866, 2.06390, 2.05954, 2.05553, 2.05183, 2.04841, 2.04523, 2.04227,
)  # fmt: skip
"""97.5 % of Student's t distribution, by degrees of freedom from 1 on; for more than these, a little too large."""
FEWEST_SEEDS = 3
"""That say anything of a deviation."""
COMPARED = ("test/top1", "test/nearest_center", "test/recall_at_1")


class Difference(NamedTuple):
    """Of a figure between two groups, over the seeds that both have."""

    name: str
    of: str
    over: str
    seeds: int
    mean: float
    low: float
    high: float

    @property
    def is_told(self) -> bool:
        """Whether the interval leaves out 0. One without a length only shows that accuracies go by steps."""
        return self.low < self.high and (self.low > 0 or self.high < 0)

    @property
    def interval(self) -> str:
        return f"{self.written(self.low)} to {self.written(self.high)}{' points' * is_part(self.name)}"

    def written(self, value: float) -> str:
        """With a sign; of parts in hundredths."""
        return f"{100 * value:+.2f}" if is_part(self.name) else f"{value:+.4f}"


def paired(a: Group, b: Group, name: str) -> Difference | None:
    """Mean of the differences of runs with the same seed, and its interval of 95 % by Student's t.

        mean -+ t(n - 1) s / sqrt(n),      s the differences' standard deviation

    None where fewer than three seeds are in common.
    """
    of, over = a.values(name), b.values(name)
    differences = [of[seed] - over[seed] for seed in of if seed in over]
    n = len(differences)
    if n < FEWEST_SEEDS:
        return None
    t = QUANTILES[min(n - 1, len(QUANTILES)) - 1]
    mean, half = statistics.mean(differences), t * statistics.stdev(differences) / math.sqrt(n)
    return Difference(name, a.label, b.label, n, mean, mean - half, mean + half)


def differences(groups: Sequence[Group]) -> list[Difference]:
    """Between all that were trained on the same data, by the usual figures and by what the runs are chosen by."""
    chosen_by = (group.first.settings.choose_by.replace("val/", "test/", 1) for group in groups)
    found = (
        paired(a, b, name)
        for name in dict.fromkeys([*COMPARED, *chosen_by])
        for a, b in combinations(groups, 2)
        if a.first.data == b.first.data
    )  # fmt: skip
    return [difference for difference in found if difference is not None]


def names_of(groups: Sequence[Group]) -> list[str]:
    """The figures that a table shows."""
    results = [run.result for group in groups for run in group.runs.values()]
    own = dict.fromkeys(name for row in results for name in own_figures(row))
    known = [*(f"train/{name}" for name in SHORT), *(f"test/{name}" for name in (*TITLES, *own))]
    return [name for name in known if any(name in row for row in results)]


def table(groups: Sequence[Group]) -> Table:
    """The result of each group, and the study's figures where they are of the same data and loss."""
    names, several = names_of(groups), any(len(group.runs) > 1 for group in groups)
    rows = []
    for group in groups:
        results = [run.result for run in group.runs.values()]
        epochs = "-".join(dict.fromkeys(str(f([row["epoch"] for row in results])) for f in (min, max)))
        figures = [_shown(group, name) for name in names]
        seeds = [str(len(results))] if several else []
        rows.append([group.label, group.first.settings.variant, *seeds, epochs, *figures])
    ours = len(rows)
    published = dict(group.first.published for group in groups if group.first.published)
    for variant, of_study in published.items():
        rows.append([BESIDE, variant, *["-"] * several, "10", *(figure(of_study, name) for name in names)])
    columns = ["run", "loss", *["seeds"] * several, "epoch", *map(title, names)]
    beside = frozenset(range(ours, len(rows)))
    return Table("result of each run", columns, rows, 2, beside)


def _shown(group: Group, name: str) -> str:
    if len(group.runs) == 1:
        return figure(group.first.result, name)
    return spread(name, list(group.values(name).values()))


def class_table(groups: Sequence[Group]) -> Table | None:
    """Class-wise test accuracies of runs whose recipe has published some, and the study's beside those of its data."""
    runs = {group.label: group.first for group in groups if group.first.by_class is not None}
    if not runs:
        return None
    by_class: dict[str, Sequence[float | None]] = {
        name: run.result.get("test/top1_by_class") or [] for name, run in runs.items()
    }
    for run in runs.values():
        if run.by_class:
            by_class[BESIDE] = run.by_class
    columns = max(map(len, by_class.values()))
    rows = [
        [name, *("-" if value is None else f"{100 * value:.1f}" for value in own), *[""] * (columns - len(own))]
        for name, own in by_class.items()
    ]
    beside = frozenset(place for place, name in enumerate(by_class) if name == BESIDE)
    return Table("test top-1 of each class, %", ["run", *(str(n + 1) for n in range(columns))], rows, 1, beside)


def difference_table(found: Sequence[Difference]) -> Table | None:
    rows = [
        [f"{d.of} - {d.over}", title(d.name), str(d.seeds), d.written(d.mean), d.interval,
         "no" if not d.is_told else "above" if d.low > 0 else "below"]
        for d in found
    ]  # fmt: skip
    columns = ["difference", "of", "seeds", "mean", "95 % interval", "told apart"]
    return Table("paired by seeds", columns, rows, 2, remarks=True) if rows else None


def sentences(groups: Sequence[Group]) -> list[str]:
    """What the figures of several groups say, and how far."""
    if len({group.first.data for group in groups}) > 1:
        return ["These runs are of different data: figures in different rows are not compared."] + [
            text for of in _by_data(groups) if len(of) > 1 for text in sentences(of)
        ]
    found = differences(groups)
    parts = [
        " ".join([f"By {title(name)}:", *(_verdict(d) for d in found if d.name == name)])
        for name in dict.fromkeys(d.name for d in found)
    ]
    if not found:
        parts.append(
            f"No two of these have {FEWEST_SEEDS} seeds in common with a figure to compare: what differs between them "
            "may well be chance."
        )
    else:
        parts.append(
            "An interval says how much other seeds alone would move a difference, if differences are about normally "
            "distributed; all runs are judged on the same test images, and of other images nothing is said."
        )
    if len(found) > 1:
        parts.append(f"Of {len(found)} such intervals, one in twenty leaves out 0 by chance where nothing differs.")
    short = [group.label for group in groups if len(group.runs) < FEWEST_SEEDS]
    if found and short:
        parts.append(f"Of fewer than {FEWEST_SEEDS} seeds, and so not compared: {', '.join(short)}.")
    return parts


def _verdict(d: Difference) -> str:
    how = f"{d.written(d.mean)}, 95 % interval {d.interval}, {d.seeds} seeds"
    if not d.is_told:
        return f"{d.of} and {d.over} are not told apart ({how})."
    return f"{d.of} is {'above' if d.mean > 0 else 'below'} {d.over} ({how})."


def _by_data(groups: Sequence[Group]) -> list[list[Group]]:
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.first.data, []).append(group)
    return list(found.values())


def _capital(text: str) -> str:
    """Names of figures begin with a capital at a sentence's start."""
    return text[0].upper() + text[1:] if text.startswith(("train ", "test ", "val ")) else text


def records(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Each group's figures, as they are, for programs."""
    names = names_of(groups)
    found = []
    for group in groups:
        record: dict[str, Any] = {"run": group.label, "variant": group.first.settings.variant}
        record |= {"seeds": " ".join(map(str, group.runs)), "dataset": group.first.facts.get("dataset", "")}
        record["epoch"] = max(run.result["epoch"] for run in group.runs.values())
        for name in names:
            values = list(group.values(name).values())
            record[name] = statistics.mean(values) if values else None
            if len(group.runs) > 1:
                record[f"{name} deviation"] = statistics.stdev(values) if len(values) > 1 else None
        found.append(record)
    return found


def told_of(run: Reported) -> list[str]:
    """What the figures of one run say."""
    row, number = run.result, run.facts.get("test")
    found = []
    top1 = row.get("test/top1")
    if top1 is not None:
        classes = run.facts.get("classes") or len(row.get("test/top1_by_class") or ())
        error = f" of {number:,} images, with a standard error of {_error(top1, number)}" if number else ""
        chance = f" Guessing would give a top-1 of about {1 / classes:.1%}." if classes else ""
        top5 = f" Top-5 is {row['test/top5']:.1%}." if row.get("test/top5") is not None else ""
        found.append(f"Test top-1 is {top1:.1%}{error}.{top5}{chance}")
    train = row.get("train/top1")
    if train is not None and top1 is not None:
        found.append(
            f"On train it was {train:.1%} in passing, with the training's own augmentation and while the weights "
            f"changed: {abs(100 * (train - top1)):.1f} points {'above' if train > top1 else 'below'} test."
        )
    for name in ("test/nearest_center", "test/recall_at_1"):
        if row.get(name) is not None and is_part(name):
            found.append(f"{_capital(title(name))} is {shown(name, row[name])}.")
    best, worst = extremes(row.get("test/top1_by_class") or (), run)
    if best and worst:
        found.append(f"Told best: {best}; worst: {worst}.")
    if (folds := fold_figures(run.rows)) is not None:
        found.append(f"Over the folds, test {folds}.")
    spread_of = row.get("train/embedding_spread")
    if spread_of is not None and spread_of < 0.01:
        found.append(f"The embeddings have collapsed: their spread is {spread_of:.4f}.")
    if row is not run.rows[-1]:
        by = title(run.settings.choose_by)
        found.append(f"The result is epoch {row['epoch']} of {run.rows[-1]['epoch']}, the best by {by}, never by test.")
    found.append("It is a single run: another seed would give other figures.")
    return found


def _error(part: float, number: int) -> str:
    return f"{100 * math.sqrt(part * (1 - part) / number):.1f} points"


def extremes(by_class: Sequence[float | None], run: Reported) -> tuple[str, str]:
    """The classes with the highest and with the lowest accuracy, and these; numbers of classes where several have."""
    values = [value for value in by_class if value is not None]
    if len(set(values)) < 2:
        return "", ""
    names, found = class_names(run, len(by_class)), []
    for extreme in (max(values), min(values)):
        of = [name for name, value in zip(names, by_class, strict=True) if value == extreme]
        found.append(f"{of[0] if len(of) == 1 else f'{len(of)} classes'} ({extreme:.0%})")
    return found[0], found[1]


def class_names(run: Reported, number: int) -> Sequence[str]:
    """Those of its gallery; numbers from 1 on where there is none."""
    known = getattr(run.gallery, "names", ())
    return known if len(known) == number else [f"class {place + 1}" for place in range(number)]
