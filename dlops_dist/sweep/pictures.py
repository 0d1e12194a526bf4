"""A sweep as pictures: every point across all parameters, and the accuracy along each of them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from dlops_dist.config import Parameter, Value
from dlops_dist.sweep.ranking import Ranked
from dlops_dist.sweep.tables import shown


def draw(folder: Path, parameters: Sequence[Parameter], ranked: Sequence[Ranked]) -> list[Path]:
    """Draw the finished points (where there are none, those that came as far as the best); returns the files."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    points = [point for point in ranked if point.epochs == ranked[0].epochs and point.mean is not None]
    folder.mkdir(exist_ok=True)
    paths = []
    for name, plot in (("parallel", _parallel), ("responses", _responses)):
        figure = plt.figure(figsize=(4 * max(2, len(parameters)), 4), layout="constrained")
        plot(figure, parameters, points)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=100)
        plt.close(figure)
    return paths


def _parallel(figure: Any, parameters: Sequence[Parameter], points: Sequence[Ranked]) -> None:
    """A line for each point through an axis for each parameter and one for its accuracy, the best on top."""
    axes = figure.subplots()
    scores = np.array([100 * (point.mean or 0.0) for point in points])
    low, high = float(scores.min()), float(scores.max())
    columns = [[_part(p, point.point[p.name]) for point in points] for p in parameters]
    columns.append(list((scores - low) / (high - low)) if high > low else [0.5] * len(points))
    colours = mpl.colormaps["viridis"]
    for heights in sorted(zip(*columns, strict=True), key=lambda heights: heights[-1]):
        axes.plot(range(len(heights)), heights, color=colours(heights[-1]), marker=".")
    for x, parameter in enumerate(parameters):
        axes.axvline(x, color="grey", linewidth=0.8)
        for value in parameter.values:
            axes.annotate(shown(value), (x, _part(parameter, value)), xytext=(4, 4), textcoords="offset points")
    axes.axvline(len(parameters), color="grey", linewidth=0.8)
    for y, score in ((0.0, low), (1.0, high)):
        axes.annotate(f"{score:.1f}", (len(parameters), y), xytext=(4, 4), textcoords="offset points")
    axes.set_xticks(range(len(columns)), [*(p.name for p in parameters), "val top-1, %"])
    axes.set(yticks=[], ylim=(-0.05, 1.12), xlim=(-0.1, len(parameters) + 0.3))


def _responses(figure: Any, parameters: Sequence[Parameter], points: Sequence[Ranked]) -> None:
    """Accuracy along each parameter, a mark for each point; bars are deviations over seeds."""
    for axes, parameter in zip(
        figure.subplots(1, len(parameters), sharey=True, squeeze=False)[0], parameters, strict=True
    ):
        values = [point.point[parameter.name] for point in points]
        x = values if parameter.is_interval else [parameter.values.index(value) for value in values]
        bars = [100 * (point.deviation or 0.0) for point in points]
        axes.errorbar(x, [100 * (point.mean or 0.0) for point in points], bars, fmt="o", capsize=3)
        axes.set_xlabel(parameter.name)
        axes.grid(alpha=0.3)
        if parameter.kind == "log-uniform":
            axes.set_xscale("log")
            ticks = np.geomspace(*parameter.ends, 4)
            axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
            axes.minorticks_off()
        elif not parameter.is_interval:
            axes.set_xticks(range(len(parameter.values)), [shown(value) for value in parameter.values])
    figure.axes[0].set_ylabel("val top-1, %")


def _part(parameter: Parameter, value: Value) -> float:
    """How much of the way through the parameter's values one lies, from 0 to 1."""
    if not parameter.is_interval:
        return parameter.values.index(value) / max(1, len(parameter.values) - 1)
    (low, high), at = parameter.ends, float(value)
    if parameter.kind == "log-uniform":
        low, high, at = math.log(low), math.log(high), math.log(at)
    return (at - low) / (high - low)
