"""Train a model.

    python -m dlops_dist.train q1 --loss center            on a Ray cluster, or on this machine's cores
    python -m dlops_dist.train q1 --loss triplet --local   in one process
    python -m dlops_dist.train q1 --smoke                  a trial of a few seconds on generated images
    python -m dlops_dist.train q1 --dry-run                what would be run: settings, data, steps, memory
    python -m dlops_dist.train q2 --finetune               the stacked autoencoder, its classifier fine-tuned end to end
    python -m dlops_dist.train my.py --local               your own model and losses (docs/extending.md)
    torchrun --nproc-per-node 4 -m dlops_dist.train q1     on processes of torchrun instead of Ray's

The same command again goes on where it stopped. `RECIPE --help` lists every setting.
"""

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dlops_dist.command_line import read_command_line
from dlops_dist.config import SHIPPED, Run, stem_of
from dlops_dist.errors import OneLineParser, UserError, exit_code_of, first_line
from dlops_dist.signals import stop_signals
from dlops_dist.torchrun import first_rank_first, joined, started_by_torchrun, wait_at_most


def main() -> None:
    task, *arguments = sys.argv[1:] or ["--help"]
    if task.startswith("-"):
        OneLineParser(
            usage="python -m dlops_dist.train RECIPE [--SETTING VALUE ...]",
            description=f"{__doc__}\nRecipes of ours: {', '.join(SHIPPED)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        ).parse_args()
        return
    with joined():
        train(task, arguments)


def train(task: str, arguments: list[str]) -> None:
    """Do what a command line asks for; of several processes that do, the first one tells."""
    with first_rank_first():
        settings, origins, dry_run = read_command_line(task, arguments)

        from dlops_dist.console import Console
        from dlops_dist.distributed.collectives import rank
        from dlops_dist.smoke import with_smoke_shards
        from dlops_dist.trackers import check_trackers

        if started_by_torchrun():
            settings = settings.model_copy(update={"local": True})
            wait_at_most(settings.collective_timeout)
        check_trackers(settings)
        if settings.smoke and not dry_run:
            settings = with_smoke_shards(task, settings)
    with Console(quiet=rank() > 0) as console:
        if dry_run:
            from dlops_dist.dry_run import describe

            for line in describe(task, settings, origins):
                console.say(line)
            return
        rows = run(task, settings, console)
        what = " ".join(filter(None, (stem_of(task), settings.variant)))
        console.say(f"result: {what} after {rows[-1]['epoch']} epochs{result_figures(rows, settings.choose_by)}")


def run(task: str, settings: Run, console: Any) -> list[dict[str, Any]]:
    """Train here, as one of several processes perhaps, or on Ray. Returns the rows of metrics."""
    from dlops_dist.data.shards import read_manifest
    from dlops_dist.distributed.collectives import of_first_rank, rank
    from dlops_dist.engine import fit, prepare
    from dlops_dist.engine.run_folder import RunFolder

    if not settings.local:
        from dlops_dist.ray_cluster import refuse_uploaded_folder

        refuse_uploaded_folder(settings)
    if settings.name is not None:
        os.environ.pop("WANDB_NAME", None)  # W&B reads it: here, and in the workers
    with first_rank_first():
        settings = prepare(task, settings)
    folder = RunFolder.of(settings)
    with nullcontext() if rank() else folder.locked(console.say):
        with first_rank_first():
            if not rank():
                folder.create(task, settings)
        manifest = read_manifest(Path(settings.data.shards))
        finished = of_first_rank(lambda: folder.finished_row(settings, manifest, console.warn))
        if finished is not None:
            console.say(f"run {folder} is complete; another --name trains anew")
        elif settings.local:
            from dlops_dist.data.memory import keep_freed_memory
            from dlops_dist.trackers import trackers_of

            keep_freed_memory()
            listeners = [console, *trackers_of(settings, console.warn)]
            with stop_signals(console.say) as stop:
                fit(settings, task=task, listeners=listeners, stop=stop)
        else:
            from dlops_dist.ray_backend import train_on_ray

            train_on_ray(task, settings, console)
        if not rank():
            console.say(f"report: {_page_of(folder)}")
        return folder.rows()


def _page_of(folder: Any) -> str:
    """A page that cannot be made fails no run that is trained."""
    from dlops_dist.report.writing import write_page

    try:
        return write_page(str(folder))
    except UserError as error:
        return f"none: {error}"
    except Exception as error:
        return f"none: {type(error).__name__}: {first_line(error)}"


def result_figures(rows: list[dict[str, Any]], choose_by: str) -> str:
    """What the last line says of a run's rows."""
    from dlops_dist.console import fold_figures, test_figures
    from dlops_dist.engine.rows import best_row

    if (folds := fold_figures(rows)) is not None:
        return f": test {folds}"
    best = best_row(rows, choose_by)
    if best is None:
        return f": test {test_figures(rows[-1])}"
    return f", best on the held-out part of train after {best['epoch']}: test {test_figures(best)}"


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
