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
from itertools import groupby
from pathlib import Path
from typing import Any

from dlops_dist.config import Run, is_loaded, load_recipe
from dlops_dist.errors import OneLineParser, UserError, exit_code_of
from dlops_dist.figures import SHORT, TITLES, drawn, figure, own_figures, title
from dlops_dist.files import Folder

BESIDE = "original study, 10 epochs"


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

    from dlops_dist.sweep.board import summarize
    from dlops_dist.sweep.folder import SweepFolder, is_sweep
    from dlops_dist.trackers import log_report

    console = Console(width=160 if not sys.stdout.isatty() else None)
    runs = []
    for place in given:
        if is_sweep(Path(place)):
            summarize(SweepFolder.open(Path(place).absolute()), console)
        else:
            runs.append(load(place))
    if runs:
        report_runs(runs, console)
    for run in runs:
        path = Folder(run.place).local
        if path is not None and not is_sweep(path.absolute().parent):  # which sends its own
            log_report(path, run.settings, lambda text: print(f"warning: {text}", file=sys.stderr))


@dataclass(frozen=True)
class Reported:
    """A run with at least one epoch."""

    place: str
    name: str
    settings: Run
    rows: list[dict[str, Any]]
    published: tuple[str, dict[str, float]] | None
    """What a study called its figures of the same data and loss, and these; None where there are none."""
    by_class: Sequence[float] | None
    """Class-wise accuracies that its recipe has published figures of; empty where those are of other data."""

    @property
    def result(self) -> dict[str, Any]:
        """The row that is the run's result."""
        from dlops_dist.engine.rows import result_row

        return result_row(self.rows, self.settings.choose_by)


def report_runs(runs: Sequence[Reported], console: Any) -> None:
    """Print the results of runs side by side, and draw each run's curves."""
    console.print(table(runs))
    class_wise = [run for run in runs if run.by_class is not None]
    if class_wise:
        console.print(class_table(class_wise))
    for run in runs:
        print(f"curves: {plot_curves(run)}")


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
        place, folder.name, settings, rows, (figures, published[figures]) if same_data else None,
        by_class if by_class is None or same_data else (),
    )  # fmt: skip


def is_of_the_study(studied: tuple[str, int], shards: Path, rows: list[dict[str, Any]]) -> bool:
    """Whether a run's shards, where they are still there, hold all of a dataset of so many classes, in its own size."""
    from dlops_dist.data.shards import read_manifest

    try:
        manifest = read_manifest(shards)
    except UserError:
        return False
    whole = manifest.packing.get("limit") is None and manifest.packing.get("size") is None
    judged = {len(by_class) for row in rows if (by_class := row.get("test/top1_by_class"))}
    return whole and {(manifest.dataset, n) for n in judged | {len(manifest.classes)}} == {studied}


def table(runs: Sequence[Reported]) -> Any:
    """The result of each run, and the study's figures where they are of the same data and loss."""
    from rich.table import Table

    results = [run.result for run in runs]
    own = dict.fromkeys(name for row in results for name in own_figures(row))
    known = [*(f"train/{name}" for name in SHORT), *(f"test/{name}" for name in (*TITLES, *own))]
    names = [name for name in known if any(name in row for row in results)]
    result = Table(title="result of each run")
    for column in ("run", "loss", "epoch", *map(title, names)):
        result.add_column(column, justify="left" if column in ("run", "loss") else "right")
    for run, row in zip(runs, results, strict=True):
        result.add_row(run.name, run.settings.variant, str(row["epoch"]), *(figure(row, name) for name in names))
    for variant, published in dict(run.published for run in runs if run.published).items():
        result.add_row(BESIDE, variant, "10", *(figure(published, name) for name in names), style="dim")
    return result


def class_table(runs: Sequence[Reported]) -> Any:
    """Class-wise test accuracies, and the study's beside those of the same data."""
    from rich.table import Table

    by_class = {run.name: run.result.get("test/top1_by_class") or [] for run in runs}
    for run in runs:
        if run.by_class:
            by_class[BESIDE] = run.by_class
    result = Table("run", title="test top-1 of each class, %")
    for number in range(max(map(len, by_class.values()))):
        result.add_column(str(number + 1), justify="right")
    for name, accuracies in by_class.items():
        shown = ("-" if value is None else f"{100 * value:.1f}" for value in accuracies)
        result.add_row(name, *shown, style="dim" if name == BESIDE else None)
    return result


def plot_curves(run: Reported) -> str:
    from dlops_dist import draw

    report = Folder(run.place) / "report"
    with report.as_path() as folder:
        draw.curves(folder / "curves.png", run.name, panels_of(run.rows))
    return str(report / "curves.png")


def panels_of(rows: Sequence[dict[str, Any]]) -> list[Any]:
    """Reconstruction errors; loss, accuracy and a recipe's own figures of each epoch; each class's test accuracy."""
    from dlops_dist.draw import Panel

    early = [row for row in rows if "stage" in row and "test/top1" not in row]
    late = rows[len(early) :]
    errors = {name: _line(list(own), "test/loss") for name, own in groupby(early, key=lambda row: row["stage"])}
    by_class = sorted((100 * (part or 0) for part in rows[-1].get("test/top1_by_class") or ()), reverse=True)
    own = [f"{split}/{name}" for split in ("val", "test") for row in late[-1:] for name in own_figures(row, split)]
    panels = [
        Panel("Test error of each layer's inputs", "mean squared error", errors, log=True),
        Panel("Loss", "loss", _lines(late, "train/loss", "val/loss", "test/loss")),
        Panel("Accuracy of the head", "%", _lines(late, "train/top1", "val/top1", "test/top1", "test/top5")),
        Panel("Figures of the recipe", "", _lines(late, *own)),
        Panel("Test top-1 of each class, best first", "%", bars=by_class),
    ]
    return [panel for panel in panels if panel.lines or panel.bars]


def _lines(rows: Sequence[dict[str, Any]], *names: str) -> dict[str, Any]:
    """Those of the figures that the rows have."""
    return {title(name): _line(rows, name) for name in names if any(name in row for row in rows)}


def _line(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    return [row["epoch"] for row in rows], [drawn(name, row.get(name)) for row in rows]


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
