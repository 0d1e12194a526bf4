"""Tables and plots of finished runs.

    python -m dlops_dist.report runs/A runs/B      one table of all, and report/curves.png in each run's folder

Beside our figures stand those that the original study reported, never adjusted to one another: its metrics are
loosely defined.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from dlops_dist.errors import OneLineParser, UserError, exit_code_of

STUDY = {
    "ce": {"train/loss": 0.12, "train/top1": 0.7225, "test/loss": 1.567, "test/top5": 0.5936},
    "triplet": {"train/loss": 0.092, "train/top1": 0.7989, "test/loss": 0.76, "test/top1": 0.65},
    "center": {"train/loss": 0.04, "train/top1": 0.7566, "test/loss": 0.85, "test/top1": 0.6345},
}
COLUMNS = {
    "train/loss": "train loss", "train/top1": "train top-1", "test/loss": "test loss", "test/top1": "test top-1",
    "test/top5": "test top-5", "test/nearest_center": "nearest centre", "test/recall_at_1": "Recall@1",
}  # fmt: skip


def main() -> None:
    parser = OneLineParser(
        prog="python -m dlops_dist.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    runs = parser.parse_args().runs
    loaded = {path: load(path) for path in runs}

    from rich.console import Console

    Console(width=160 if not sys.stdout.isatty() else None).print(table(loaded))
    for path, (_, rows) in loaded.items():
        print(f"curves: {plot_curves(path, rows)}")


def load(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """Loss and rows of metrics of a run with at least one epoch."""
    from dlops_dist.engine.run_folder import RunFolder

    folder = RunFolder(run)
    _, settings = folder.settings()
    rows = folder.rows()
    if not rows:
        raise UserError(f"{run} has no finished epoch yet")
    return settings.loss, rows


def table(runs: dict[Path, tuple[str, list[dict[str, Any]]]]) -> Any:
    """The last epoch of each run, and the study's figures of the losses that occur."""
    from rich.table import Table

    result = Table(title="last epoch")
    for column in ("run", "loss", "epochs", *COLUMNS.values()):
        result.add_column(column, justify="left" if column in ("run", "loss") else "right")
    for path, (loss, rows) in runs.items():
        result.add_row(path.name, loss, str(rows[-1]["epoch"]), *(_cell(name, rows[-1]) for name in COLUMNS))
    for loss in dict.fromkeys(loss for loss, _ in runs.values()):
        result.add_row("original study", loss, "10", *(_cell(name, STUDY[loss]) for name in COLUMNS), style="dim")
    return result


def _cell(name: str, row: dict[str, Any]) -> str:
    if name not in row:
        return "-"
    return f"{row[name]:.4f}" if name.endswith("loss") else f"{row[name]:.2%}"


def plot_curves(run: Path, rows: list[dict[str, Any]]) -> Path:
    """Loss and accuracy of each epoch, train and test; and each class's test accuracy after the last."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (loss, accuracy, classes) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    for split in ("train", "val", "test"):
        if f"{split}/loss" in rows[0]:
            loss.plot(epochs, [row[f"{split}/loss"] for row in rows], marker=".", label=split)
            accuracy.plot(epochs, [100 * row[f"{split}/top1"] for row in rows], marker=".", label=f"{split} top-1")
    accuracy.plot(epochs, [100 * row["test/top5"] for row in rows], marker=".", linestyle=":", label="test top-5")
    by_class = sorted((100 * (value or 0) for value in rows[-1]["test/top1_by_class"]), reverse=True)
    classes.bar(range(len(by_class)), by_class, width=1.0)
    for axes, title, x, y in (
        (loss, "Loss", "epoch", "loss"),
        (accuracy, "Accuracy of the head", "epoch", "%"),
        (classes, "Test top-1 of each class, best first", "class", "%"),
    ):
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
    loss.legend()
    accuracy.legend()
    figure.suptitle(run.name)
    path = run / "report" / "curves.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
