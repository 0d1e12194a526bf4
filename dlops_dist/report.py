"""Tables and plots of finished runs and of sweeps.

    python -m dlops_dist.report runs/A runs/B      one table of all, and report/curves.png in each run's folder
    python -m dlops_dist.report runs/SWEEP         its ranking, what each parameter had to do with it, and plots of both

Beside figures of the study's own data stand those that it reported after its 10 epochs, never adjusted to one another:
its metrics are loosely defined.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlops_dist.config import is_loaded, load_recipe
from dlops_dist.errors import OneLineParser, UserError, exit_code_of
from dlops_dist.files import Folder

Rows = list[dict[str, Any]]
Figures = dict[str, float]

BESIDE = "original study, 10 epochs"
COLUMNS = {
    "train/loss": "train loss", "train/top1": "train top-1", "test/loss": "test loss", "test/top1": "test top-1",
    "test/top5": "test top-5", "test/nearest_center": "nearest centre", "test/recall_at_1": "Recall@1",
}  # fmt: skip


def main() -> None:
    parser = OneLineParser(
        prog="python -m dlops_dist.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run or of a sweep, or its URL")
    parser.add_argument("--recipe", help="of a sweep over your own recipe: its file, or its module's name")
    arguments = parser.parse_args()
    given = arguments.runs
    if arguments.recipe:
        load_recipe(arguments.recipe)

    from rich.console import Console

    from dlops_dist.sweep.folder import SweepFolder
    from dlops_dist.sweep.summary import summarize

    console = Console(width=160 if not sys.stdout.isatty() else None)
    sweeps = [folder for place in given if (folder := SweepFolder(Path(place).absolute())).is_sweep()]
    for folder in sweeps:
        summarize(folder, console)
    runs = [load(place) for place in given if not SweepFolder(Path(place)).is_sweep()]
    if runs:
        report_runs(runs, console)
        log_reports([run.place for run in runs])


@dataclass(frozen=True)
class Reported:
    """A run with at least one epoch."""

    place: str
    name: str
    variant: str
    rows: Rows
    published: tuple[str, Figures] | None
    """What a study called its figures of the same data and loss, and these; None where there are none."""
    by_class: Sequence[float] | None
    """Class-wise accuracies that its recipe has published figures of; empty where those are of other data."""


def report_runs(runs: list[Reported], console: Any) -> None:
    """Print the results of runs side by side, and draw each run's curves."""
    console.print(table(runs))
    class_wise = [run for run in runs if run.by_class is not None]
    if class_wise:
        console.print(class_table(class_wise))
    for run in runs:
        print(f"curves: {plot_curves(run)}")


def log_reports(runs: Sequence[str]) -> None:
    """Send the pictures of runs that were logged to W&B there too; a sweep sends its own, not those of its trials."""
    from dlops_dist.engine.run_folder import RunFolder
    from dlops_dist.sweep.folder import SweepFolder
    from dlops_dist.trackers import log_report

    for run in runs:
        path = Folder(run).local
        if path is not None and not SweepFolder(path.absolute().parent).is_sweep():
            log_report(path, RunFolder(path).settings()[1], lambda text: print(f"warning: {text}", file=sys.stderr))


def load(place: str) -> Reported:
    """A run, by its folder."""
    from dlops_dist.engine.run_folder import RunFolder

    folder = RunFolder(place)
    task, settings = folder.settings()
    rows = folder.rows()
    if not rows:
        raise UserError(f"{place} has no finished epoch yet")
    study: Any = load_recipe(task).module if is_loaded(task) else None
    published = getattr(study, "STUDY", {})
    figures = settings.variant if settings.variant in published else next(iter(published), "")
    same_data = bool(published) and is_of_the_study(study.STUDY_DATA, Path(settings.data.shards), rows)
    by_class = getattr(study, "STUDY_CLASSES", None)
    return Reported(
        place, folder.name, settings.variant, rows, (figures, published[figures]) if same_data else None,
        by_class if by_class is None or same_data else (),
    )  # fmt: skip


def is_of_the_study(studied: tuple[str, int], shards: Path, rows: Rows) -> bool:
    """Whether a run's shards, where they are still there, hold all of a dataset of so many classes, in its own size."""
    from dlops_dist.data.shards import read_manifest

    try:
        manifest = read_manifest(shards)
    except UserError:
        return False
    whole = manifest.packing.get("limit") is None and manifest.packing.get("size") is None
    judged = {len(row["test/top1_by_class"]) for row in rows if "test/top1_by_class" in row}
    return whole and {(manifest.dataset, n) for n in judged | {len(manifest.classes)}} == {studied}


def table(runs: list[Reported]) -> Any:
    """The result of each run, and the study's figures where they are of the same data and loss."""
    from rich.table import Table

    from dlops_dist.console import figure
    from dlops_dist.engine.rows import result_row

    result = Table(title="result of each run")
    for column in ("run", "loss", "epoch", *COLUMNS.values()):
        result.add_column(column, justify="left" if column in ("run", "loss") else "right")
    for run in runs:
        row = result_row(run.rows)
        result.add_row(run.name, run.variant, str(row["epoch"]), *(figure(row, name) for name in COLUMNS))
    for variant, published in dict(run.published for run in runs if run.published).items():
        result.add_row(BESIDE, variant, "10", *(figure(published, name) for name in COLUMNS), style="dim")
    return result


def class_table(runs: list[Reported]) -> Any:
    """Class-wise test accuracies, and the study's beside those of the same data."""
    from rich.table import Table

    from dlops_dist.engine.rows import result_row

    by_class = {run.name: result_row(run.rows).get("test/top1_by_class", []) for run in runs}
    for run in runs:
        if run.by_class:
            by_class[BESIDE] = list(run.by_class)
    result = Table("run", title="test top-1 of each class, %")
    for number in range(max(map(len, by_class.values()))):
        result.add_column(str(number + 1), justify="right")
    for name, accuracies in by_class.items():
        shown = ("-" if value is None else f"{100 * value:.1f}" for value in accuracies)
        result.add_row(name, *shown, style="dim" if name == BESIDE else None)
    return result


def plot_curves(run: Reported) -> str:
    """Loss and accuracy of each epoch, train and test; each class's test accuracy; reconstruction errors."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    pretrained = [row for row in run.rows if "train/top1" not in row]
    classified = run.rows[len(pretrained) :]
    panels = [_plot_errors] * bool(pretrained) + [_plot_loss, _plot_accuracy, _plot_classes] * bool(classified)
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", squeeze=False)
    for panel, plot in zip(axes[0], panels, strict=True):
        plot(panel, pretrained if plot is _plot_errors else classified)
        panel.grid(alpha=0.3)
    figure.suptitle(run.name)
    report = Folder(run.place) / "report"
    with report.as_path() as folder:
        figure.savefig(folder / "curves.png", dpi=100)
    plt.close(figure)
    return str(report / "curves.png")


def _plot_errors(axes: Any, rows: Rows) -> None:
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == stage]
        axes.plot([row["epoch"] for row in own], [row["test/loss"] for row in own], marker=".", label=stage)
    axes.set(title="Test error of each layer's inputs", xlabel="epoch", ylabel="mean squared error", yscale="log")
    axes.legend()


def _plot_loss(axes: Any, rows: Rows) -> None:
    for split in _splits(rows):
        axes.plot([row["epoch"] for row in rows], [row[f"{split}/loss"] for row in rows], marker=".", label=split)
    axes.set(title="Loss", xlabel="epoch", ylabel="loss")
    axes.legend()


def _plot_accuracy(axes: Any, rows: Rows) -> None:
    epochs = [row["epoch"] for row in rows]
    for split in _splits(rows):
        axes.plot(epochs, [100 * row[f"{split}/top1"] for row in rows], marker=".", label=f"{split} top-1")
    axes.plot(epochs, [100 * row["test/top5"] for row in rows], marker=".", linestyle=":", label="test top-5")
    axes.set(title="Accuracy of the head", xlabel="epoch", ylabel="%")
    axes.legend()


def _plot_classes(axes: Any, rows: Rows) -> None:
    by_class = sorted((100 * (value or 0) for value in rows[-1]["test/top1_by_class"]), reverse=True)
    axes.bar(range(len(by_class)), by_class, width=1.0)
    axes.set(title="Test top-1 of each class, best first", xlabel="class", ylabel="%")


def _splits(rows: Rows) -> list[str]:
    return [split for split in ("train", "val", "test") if f"{split}/loss" in rows[0]]


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
