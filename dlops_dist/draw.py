"""All that is drawn: figures by matplotlib, which nothing else imports, and images of pixels."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from dlops_dist import figures
from dlops_dist.config import Parameter, Point, Value
from dlops_dist.config.sweep import word
from dlops_dist.data.shards import Manifest, Split
from dlops_dist.figures import Panel

COLUMNS, SAMPLE_ROWS = 10, 20
ABREAST = 3
"""Plots that stand beside each other."""
NAMED, LONGEST = 40, 32
"""Classes at most whose names are drawn, and letters of a name."""


def image_grid(path: Path, images: np.ndarray, columns: int = COLUMNS, gap: int = 1) -> None:
    """Images, uint8 (N, H, W, C), row by row, some white pixels apart."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    grid = np.full((rows * columns, height + gap, width + gap, channels), 255, np.uint8)
    grid[:n, :height, :width] = images
    grid = grid.reshape(rows, columns, height + gap, width + gap, channels).swapaxes(1, 2)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(grid.reshape(rows * (height + gap), columns * (width + gap), channels)).save(path)


def samples(path: Path, shards: Path, manifest: Manifest) -> None:
    """A row of training images for each of the first classes; black where one has few."""
    train = Split(shards, manifest, "train")
    rows = min(SAMPLE_ROWS, len(manifest.classes))
    images = np.zeros((rows, COLUMNS, manifest.height, manifest.width, 3), np.uint8)
    for label in range(rows):
        ids = np.flatnonzero(train.labels == label)[:COLUMNS]
        images[label, : len(ids)] = train.read(ids)
    image_grid(path, images.reshape(-1, *images.shape[2:]), gap=0)


def curves(path: Path, title: str, panels: Sequence[Panel]) -> None:
    columns = min(ABREAST, len(panels)) or 1
    rows = -(-len(panels) // columns) or 1
    figure = _figure(5 * columns, 4 * rows)
    every = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(every, panels, strict=False):
        for line in panel.lines:
            shown = [(x, y if panel.is_drawn(y) else math.nan) for x, y in line.points]
            label, marker = (None, "") if line.faint else (_plain([line.label])[0], ".")
            look = {"color": f"C{line.colour % 10}", "alpha": 0.35 if line.faint else 1, "marker": marker}
            axes.plot(*zip(*shown, strict=True), label=label, **look)
        axes.set(title=_plain([panel.title])[0], xlabel=panel.x, ylabel=panel.unit)
        axes.set_yscale("log" if panel.log else "linear")
        axes.grid(alpha=0.3)
        if any(line.label for line in panel.lines):
            axes.legend(fontsize="small")
    for axes in every[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(_plain([title])[0])
    _save(path, figure)


def class_accuracies(path: Path, accuracies: Sequence[float | None], classes: Sequence[str]) -> None:
    """A bar for each class; of many for the best and the worst, the best first."""
    title, shown = "Test top-1 of each class", list(zip(accuracies, classes, strict=True))
    if len(shown) > NAMED:
        shown.sort(key=lambda of: -(of[0] or 0))
        shown = [*shown[: NAMED // 2], *shown[-NAMED // 2 :]]
        title = f"Test top-1 of the {NAMED // 2} best and the {NAMED // 2} worst of {len(classes)} classes"
    figure = _figure(max(4.0, 0.6 * len(shown)), 4.0)
    axes = figure.subplots()
    bars = axes.bar(range(len(shown)), [100 * (value or 0) for value, _ in shown])
    axes.bar_label(bars, fmt="%.0f")
    axes.set(title=title, ylabel="%", ylim=(0, 105))
    axes.set_xticks(range(len(shown)), _plain([name for _, name in shown]), rotation=45, ha="right")
    _save(path, figure)


def confusion(path: Path, counts: Sequence[Sequence[int]] | np.ndarray, classes: Sequence[str]) -> None:
    """How many test samples of a class (row) were taken for which (column); of many classes without their names."""
    is_named = len(classes) <= NAMED
    size = max(4.0, 0.6 * len(classes)) if is_named else 8.0
    figure, table = _figure(size, size), np.asarray(counts)
    axes = figure.subplots()
    shades = axes.imshow(table, cmap="Blues")
    axes.set(title="Confusion on test", xlabel="taken for", ylabel="is")
    if is_named:
        for (row, column), count in np.ndenumerate(table):
            color = "white" if count > table.max() / 2 else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=color)
        axes.set_xticks(range(len(classes)), _plain(classes), rotation=45, ha="right")
        axes.set_yticks(range(len(classes)), _plain(classes))
    else:
        figure.colorbar(shades, ax=axes, shrink=0.8, label="images")
    _save(path, figure)


def sweep(folder: Path, parameters: Sequence[Parameter], choose_by: str, ranked: Sequence[Any]) -> list[Path]:
    """Points of a sweep across all parameters, and along each of them; returns the files.

    Args:
        ranked: as a sweep's folder ranks them; those that came less far than the best are left out.
    """
    points = [point for point in ranked if point.epochs == ranked[0].epochs and point.mean is not None]
    y = np.array([figures.drawn(choose_by, point.mean) for point in points])
    bars = np.array([figures.drawn(choose_by, point.deviation or 0.0) for point in points])
    named = figures.title(choose_by) + ", %" * figures.is_part(choose_by)
    across, along = (_figure(4 * max(2, len(parameters)), 4) for _ in range(2))
    _parallel(across.subplots(), parameters, [point.point for point in points], y, figures.gain(choose_by, 1.0) < 0)
    across.axes[0].set_xticks(range(len(parameters) + 1), [*(p.name for p in parameters), named])
    for axes, p in zip(along.subplots(1, len(parameters), sharey=True, squeeze=False)[0], parameters, strict=True):
        _response(axes, p, [point.point[p.name] for point in points], y, bars)
    along.axes[0].set_ylabel(named)
    _save(folder / "parallel.png", across)
    _save(folder / "responses.png", along)
    return [folder / "parallel.png", folder / "responses.png"]


def _parallel(
    axes: Any, parameters: Sequence[Parameter], points: Sequence[Point], y: np.ndarray, lower_is_better: bool
) -> None:
    """A line for each point through an axis for each parameter and one for its figure, the best on top."""
    worst, best = (y.max(), y.min()) if lower_is_better else (y.min(), y.max())
    columns = [[_place(p, point[p.name]) for point in points] for p in parameters]
    columns.append(list((y - worst) / (best - worst)) if best != worst else [0.5] * len(y))
    colours = colormaps["viridis"]
    lines = sorted(zip(*columns, strict=True), key=lambda heights: heights[-1])
    for place, heights in enumerate(lines, 1):
        is_best = place == len(lines)
        look: dict[str, Any] = {"color": "C3", "linewidth": 3.0} if is_best else {"color": colours(heights[-1])}
        axes.plot(range(len(heights)), heights, marker=".", **look)
    marks = [(x, _place(p, value), word(value)) for x, p in enumerate(parameters) for value in p.values]
    marks += [(len(parameters), 0.0, f"{worst:.3g}"), (len(parameters), 1.0, f"{best:.3g}")]
    for x, height, text in marks:
        axes.annotate(text, (x, height), xytext=(4, 4), textcoords="offset points")
        axes.axvline(x, color="grey", linewidth=0.8)
    axes.set(yticks=[], ylim=(-0.05, 1.12), xlim=(-0.1, len(parameters) + 0.3))


def _response(axes: Any, parameter: Parameter, values: Sequence[Value], y: np.ndarray, bars: np.ndarray) -> None:
    """A mark for each point along a parameter, with its deviation over seeds; the first one is the best."""
    x = list(values) if parameter.is_interval else [parameter.values.index(value) for value in values]
    axes.errorbar(x, y, bars, fmt="o", capsize=3)
    axes.plot(x[:1], y[:1], "*", color="C3", markersize=16, zorder=3, label="best point")
    axes.legend(fontsize="small")
    axes.set_xlabel(parameter.name)
    axes.grid(alpha=0.3)
    if parameter.kind == "log-uniform":
        axes.set_xscale("log")
        ticks = np.geomspace(*parameter.ends, 4)
        axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axes.minorticks_off()
    elif not parameter.is_interval:
        axes.set_xticks(range(len(parameter.values)), [word(value) for value in parameter.values])


def _place(parameter: Parameter, value: Value) -> float:
    """How much of the way through the parameter's values one lies, from 0 to 1."""
    if not parameter.is_interval:
        return parameter.values.index(value) / max(1, len(parameter.values) - 1)
    (low, high), at = parameter.ends, float(value)
    if parameter.kind == "log-uniform":
        low, high, at = math.log(low), math.log(high), math.log(at)
    return (at - low) / (high - low)


def _figure(width: float, height: float) -> Any:
    return Figure(figsize=(width, height), layout="constrained")


def _save(path: Path, figure: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _plain(names: Sequence[str]) -> list[str]:
    """Names as they are, the beginning of long ones: a dollar sign begins no formula."""
    short = (name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in names)
    return [name.replace("$", r"\$") for name in short]
