"""Search the settings of a recipe: which margin, learning rate and momentum?

    python -m dlops_dist.tune                              q1 with triplet loss, as configs/tune.yaml has it
    python -m dlops_dist.tune q2 --num-samples 32          the stacked autoencoder, as configs/tune-q2.yaml has it
    python -m dlops_dist.tune --loss center --space "center.weight log-uniform 0.001 0.1" "optimizer.lr grid 0.05 0.1"
    python -m dlops_dist.tune --smoke                      two trials of seconds on generated images

Points are compared on a part held out of train; the best is then read out on test, and written to best.yaml, which
`train --config` takes. The same command again goes on where it stopped, and gives the same ranking.
`RECIPE --help` lists every setting: those of `train`, the same for all trials, and those of the search.
"""

import os
import sys
from pathlib import Path
from typing import cast

from dlops_dist.command_line import read_sweep
from dlops_dist.config import DEFAULT, SHIPPED, Sweep, check_sweep, stem_of
from dlops_dist.errors import RunError, exit_code_of


def main() -> None:
    task, arguments = DEFAULT, sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"{__doc__}\nRecipes of ours: {', '.join(SHIPPED)} (by default {task})")
        return
    if arguments and not arguments[0].startswith("-"):
        task, *arguments = arguments
    sweep = read_sweep(task, arguments)
    check_sweep(sweep)

    from dlops_dist.smoke import with_smoke_shards
    from dlops_dist.trackers import check_trackers

    check_trackers(sweep)
    if sweep.smoke:
        sweep = cast(Sweep, with_smoke_shards(task, sweep))
    print(f"result: {run_sweep(task, sweep)}")


def run_sweep(task: str, sweep: Sweep) -> str:
    """Train what is not trained yet of a sweep, and sum it up. Returns the best point in words and numbers."""
    from dlops_dist.engine import prepare
    from dlops_dist.engine.run_folder import RunFolder
    from dlops_dist.ray_cluster import refuse_uploaded_folder
    from dlops_dist.ray_tuner import train_trials
    from dlops_dist.report.printing import Printed
    from dlops_dist.report.writing import write_sweep
    from dlops_dist.sweep.board import Board, best_line
    from dlops_dist.sweep.folder import SweepFolder
    from dlops_dist.trackers import log_pictures

    refuse_uploaded_folder(sweep)
    prepared = cast(Sweep, prepare(task, sweep))
    if sweep.name is not None:
        os.environ.pop("WANDB_RUN_GROUP", None)
    sweep = prepared if sweep.name else prepared.model_copy(update={"name": f"tune-{prepared.name}"})
    os.environ.setdefault("WANDB_RUN_GROUP", str(sweep.name))  # W&B reads it: here, and in the workers
    for name in ("WANDB_NAME", "WANDB_RUN_ID"):  # one run's, not all trials'
        os.environ.pop(name, None)
    folder = SweepFolder(Path(sweep.runs_dir) / str(sweep.name), task, sweep)
    known = folder.known_trials()
    with RunFolder(folder.path).locked(), Board(folder) as board:
        folder.create()
        train_trials(folder, known, board)
    best = write_sweep(folder, Printed())
    if best is None:
        raise RunError(f"no trial of {folder.path} came to the end of an epoch; the table says why")
    if sweep.wandb != "off":
        log_pictures(sweep.wandb, folder.path, board.warn)
    print(f"best point: {folder.write_best(best.point)}")
    return f"{' '.join(filter(None, (stem_of(task), sweep.variant)))}: {best_line(folder, best)}"


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
