"""What is drawn of runs as curves: each figure over epochs, or over steps."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from dlops_dist.engine.gallery import Gallery
from dlops_dist.figures import TITLES, Line, Panel, drawn, is_part, own_figures, title
from dlops_dist.report.runs import Group, Reported

OF_EPOCHS = {
    "train/embedding_spread": "Spread of the embeddings' directions in training",
    "lr": "Learning rate at the epoch's end",
    "train_images_per_s": "Images a second in training",
}
OF_STEPS = {
    "loss": "Loss", "lr": "Learning rate", "gradient_norm": "Norm of the gradient, before clipping",
    "active_triplets": "Part of the triplets that are active", "center_spread": "Spread of the centres",
    "images_per_s": "Images a second", "memory_gb": "Memory, GB",
}  # fmt: skip
BY_EPOCH = (
    "train/loss", "val/loss", "test/loss", "train/top1", "val/top1", "test/top1", "test/top5", "test/nearest_center",
    "test/recall_at_1", "test/map_at_r",
)  # fmt: skip


def epoch_panels(run: Reported) -> list[Panel]:
    """Reconstruction errors; losses and their parts, accuracies, what is retrieved; rate, spread, speed, time."""
    early = [row for row in run.rows if "stage" in row and "test/top1" not in row]
    rows = run.rows[len(early) :]
    layers = [(str(name), list(own)) for name, own in groupby(early, key=lambda row: row["stage"])]
    errors = [Line(name, _points(own, "test/loss"), colour) for colour, (name, own) in enumerate(layers)]
    last = rows[-1] if rows else {}
    parts = [n for n in last if n.startswith("train/") and n.replace("train/", "test/") in last]
    parts = [n.partition("/")[2] for n in parts if n.partition("/")[2] not in TITLES]
    retrieved = [n for n in TITLES if n not in ("loss", "top1", "top5")]
    own_names = [f"{split}/{name}" for split in ("val", "test") for name in own_figures(last, split)]
    times = [
        Line("whole epoch", _points(run.rows, "epoch_s"), 0),
        Line("training", [(row["epoch"], s or math.nan) for row, s in zip(run.rows, training_s(run), strict=True)], 1),
    ]
    return _drawn(
        [
            Panel("Test error of each layer's inputs", errors, unit="mean squared error", log=True),
            Panel("Loss", _lines(rows, "train/loss", "val/loss", "test/loss")),
            Panel("Parts of the loss", _lines(rows, *_split(parts)) if len(parts) > 1 else []),
            Panel("Accuracy of the head", _lines(rows, *_split(["top1", "top5"])), unit="%"),
            Panel("Accuracy of the embedding", _lines(rows, *_split(retrieved)), unit="%"),
            Panel("Figures of the recipe", _lines(rows, *own_names)),
            *(_alone(name, rows if "/" in name else run.rows) for name in OF_EPOCHS),
            Panel("Time of each epoch", times, unit="s"),
        ]
    )


def _split(names: Iterable[str]) -> list[str]:
    return [f"{split}/{name}" for split in ("train", "val", "test") for name in names]


def step_panels(run: Reported) -> list[Panel]:
    """Whatever was logged of steps, each figure by its own chart."""
    there = dict.fromkeys(n for row in run.steps for n, v in row.items() if isinstance(v, int | float))
    names = [*OF_STEPS, *(name for name in there if name not in OF_STEPS and name not in ("epoch", "step"))]
    return _drawn(_alone(name, run.steps, "step", OF_STEPS) for name in names)


def distance_panel(gallery: Gallery) -> Panel:
    middles = ((gallery.distances[1:] + gallery.distances[:-1]) / 2).tolist()
    of = zip(("of the same class", "of different classes"), 100 * gallery.alike, strict=True)
    lines = [Line(name, list(zip(middles, parts.tolist(), strict=True)), i) for i, (name, parts) in enumerate(of)]
    return Panel("Pairs of test images by the distance of their embeddings", lines, "distance", "% of the pairs")


def _alone(name: str, rows: Sequence[dict[str, Any]], x: str = "epoch", titles: Mapping[str, str] = OF_EPOCHS) -> Panel:
    """A single line, which the title names."""
    return Panel(titles.get(name, name), [Line("", _points(rows, name, x))], x)


def _lines(rows: Sequence[dict[str, Any]], *names: str) -> list[Line]:
    """Those of the figures that the rows have."""
    there = [name for name in names if any(isinstance(row.get(name), int | float) for row in rows)]
    return [Line(title(name), _points(rows, name), colour) for colour, name in enumerate(there)]


def _points(rows: Sequence[dict[str, Any]], name: str, x: str = "epoch") -> list[tuple[float, float]]:
    values = ((row[x], row.get(name)) for row in rows)
    return [(at, drawn(name, value if isinstance(value, int | float) else None)) for at, value in values]


def training_s(run: Reported) -> list[float]:
    """Seconds of each epoch in which it trained; 0 where that is not known."""
    steps, found = [0, *(row["step"] for row in run.rows)], []
    for before, row in zip(steps, run.rows, strict=False):
        rate, images = row.get("train_images_per_s"), (row["step"] - before) * run.settings.global_batch_size
        found.append(min(images / rate, row.get("epoch_s") or math.inf) if rate else 0.0)
    return found


def overlaid(groups: Sequence[Group]) -> list[Panel]:
    """The curves of several runs, laid over each other."""
    rows = [row for group in groups for run in group.runs.values() for row in run.rows[-1:]]
    own = [f"{split}/{name}" for split in ("val", "test") for row in rows for name in own_figures(row, split)]
    titles = {name: title(name) for name in (*BY_EPOCH, *own)} | OF_EPOCHS
    return _drawn(
        Panel(titled, _of_groups(groups, name), unit="%" if is_part(name) else "") for name, titled in titles.items()
    )


def _of_groups(groups: Sequence[Group], name: str) -> list[Line]:
    """A line for each group, the mean of its seeds at the epochs that all have, and behind it a faint one for each."""
    found = []
    for colour, group in enumerate(groups):
        curves = [
            {row["epoch"]: drawn(name, row[name]) for row in run.rows if isinstance(row.get(name), int | float)}
            for run in group.runs.values()
        ]
        if len(curves) > 1:
            found += [
                Line(f"{group.label}, seed {seed}", sorted(curve.items()), colour, faint=True)
                for seed, curve in zip(group.runs, curves, strict=True)
            ]
        shared = sorted(set.intersection(*map(set, curves)))
        points = [(epoch, statistics.mean(curve[epoch] for curve in curves)) for epoch in shared]
        found.append(Line(group.label + f", mean of {len(curves)} seeds" * (len(curves) > 1), points, colour))
    return found


def _drawn(panels: Iterable[Panel]) -> list[Panel]:
    return [panel for panel in panels if not panel.is_empty]
