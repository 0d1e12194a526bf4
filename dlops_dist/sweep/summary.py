"""What a sweep came to, made from its folder alone: tables, pictures, and the best point."""

import statistics
from collections.abc import Sequence

from rich.console import Console

from dlops_dist.engine.run_folder import RunFolder
from dlops_dist.sweep.folder import SweepFolder
from dlops_dist.sweep.pictures import draw
from dlops_dist.sweep.ranking import Ranked, ranking
from dlops_dist.sweep.tables import described, importance_table, ranking_table


def summarize(folder: SweepFolder, out: Console) -> Ranked | None:
    """Print the ranking and what it says, draw it, and return the best point; None where none has a figure yet."""
    _, sweep = folder.settings()
    ranked = ranking(folder.trials())
    out.print(ranking_table(f"{folder.path.name}: points, best first", sweep.parameters, ranked))
    if not ranked or ranked[0].mean is None:
        return None
    out.print(importance_table(sweep.parameters, ranked))
    for path in draw(folder.pictures, sweep.parameters, ranked):
        out.print(f"drawn: {path}", markup=False)
    return ranked[0]


def best_line(folder: SweepFolder, best: Ranked) -> str:
    """The best point and its test figures: those of its runs' last epochs, read here for the first and only time."""
    tested = [RunFolder(folder.path / trial.name).rows()[-1]["test/top1"] for trial in best.trials if trial.rows]
    seeds = f"mean of {len(tested)} seeds" if len(tested) > 1 else "one seed"
    return f"{described(best.point)}: val top-1 {_spread(best.scores)}, test top-1 {_spread(tested)} ({seeds})"


def _spread(figures: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(figures):.2%}" if len(figures) > 1 else ""
    return f"{statistics.mean(figures):.2%}{deviation}"
