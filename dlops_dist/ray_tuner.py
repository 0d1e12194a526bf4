"""Runs the trials of a sweep by Ray Tune: each in one process, or on a group of workers of its own."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from dlops_dist.config import Run, Sweep, load_recipe, recipe_from_source
from dlops_dist.engine.run_folder import RunFolder
from dlops_dist.errors import RunError, UserError, last_line
from dlops_dist.events import EpochEnded, Event, Placed, Warned
from dlops_dist.ray_backend import train_group, wandb_environment
from dlops_dist.ray_cluster import cluster
from dlops_dist.ray_places import places_for
from dlops_dist.ray_worker import fit_here
from dlops_dist.sweep.board import Board
from dlops_dist.sweep.folder import ENDED, SWEEP, SweepFolder, gain_of, is_compared, note_end

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_worker_maximum_startup_concurrency": "8",  # more processes than Ray expects on few cores
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # not each report has a gain
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends a sweep as it ends a run
}
DRIVER = {"CPU": 0, "node:__internal_head__": 0.001}
"""What the process takes that waits for a trial's workers: a CPU would be one that they wait for, for ever."""


def train_trials(folder: SweepFolder, known: Sequence[Run], board: Board) -> None:
    """Train the runs that are known and not over, then those that Optuna suggests, as many at a time as fit.

    They are trained on the cluster of RAY_ADDRESS, or on one started here. One that fails has the reason in its folder,
    and the others go on.
    """
    sweep, num_workers = folder.sweep, folder.sweep.workers or 1
    folder.create_runs(known)
    unfinished = [settings for settings in known if not folder.is_over(settings)]
    unknown = max(0, sweep.num_samples * sweep.seeds - len(known)) if sweep.search == "optuna" else 0
    if not unfinished and not unknown:
        board.say(f"sweep {folder.path} is complete; it goes on with more --num-samples or --seeds")
        return
    num_trials, num_all = len(unfinished) + unknown, len(known) + unknown
    os.environ.update(QUIET)
    with cluster(board.say):
        import ray
        from ray import tune

        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial that fails is told by the board
        places = ray.cluster_resources()
        at_once = trials_at_once(sweep, num_all, int(places.get("GPU", 0) or places.get("CPU", 0)))
        resources, _, _ = places_for(  # for the workers of all trials: those that go on keep their CPUs
            num_workers * at_once, sweep.data.shards, str(folder.path), SWEEP
        )
        board.say(
            f"{num_trials} of {num_all} trials to train, {at_once} at a time, each on {num_workers} "
            f"worker{'s' * (num_workers > 1)} with {resources}"
        )
        driver = partial(
            _drive, task=folder.task, source=load_recipe(folder.task).source, num_workers=num_workers,
            resources=resources, environment=wandb_environment(sweep),
        )  # fmt: skip
        tune.Tuner(
            tune.with_resources(driver, DRIVER if num_workers > 1 else resources),
            tune_config=tune.TuneConfig(
                search_alg=_queue(chain(unfinished, folder.suggested_trials() if unknown else ())),
                num_samples=num_trials, max_concurrent_trials=at_once, scheduler=_scheduler(sweep),
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="tune", storage_path=str(folder.path / ".ray"), verbose=0, callbacks=[_watcher(board)],
                failure_config=tune.FailureConfig(max_failures=sweep.max_restarts),
            ),
        ).fit()  # fmt: skip


def _queue(trials: Iterator[Run]) -> Any:
    """Hands the trials to Tune when it has room; it need tell nothing: their folders say what came of them."""
    from ray.tune.search import Searcher

    class Queue(Searcher):
        def __init__(self, trials: Iterator[Run]) -> None:
            super().__init__()
            self.trials = trials

        def __reduce__(self) -> Any:  # as that of the watcher
            return Queue, (iter(()),)

        def suggest(self, trial_id: str) -> Any:
            settings = next(self.trials, None)
            return Searcher.FINISHED if settings is None else {"settings": settings.model_dump()}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None: ...

        def save(self, checkpoint_path: str) -> None: ...

    return Queue(trials)


def trials_at_once(sweep: Sweep, num_trials: int, cluster_slots: int) -> int:
    """How many trials have all their workers at the same time, so that none waits for another's.

    Args:
        cluster_slots: GPUs of the cluster, or its CPUs where it has none: the most workers it can hold.
    """
    workers, wanted = sweep.workers or 1, sweep.concurrency
    fitting = cluster_slots // workers
    if not fitting:
        raise UserError(f"workers: a trial of {workers} does not fit on a cluster for {cluster_slots} workers")
    if wanted is not None and wanted > fitting:
        raise UserError(
            f"concurrency: {wanted} trials with {workers} workers each need {wanted * workers} of the "
            f"{cluster_slots} places that the cluster has for workers; pass --concurrency {fitting}"
        )
    return min(wanted or fitting, num_trials)


def _scheduler(sweep: Sweep) -> Any:
    """Of trials: none, or one that gives up the worst of them, judged as the ranking judges, never by test."""
    if sweep.scheduler == "none":
        return None
    from ray.tune.schedulers import ASHAScheduler

    last = max(1, sweep.epochs - 1)  # after the last epoch nothing is saved by giving up
    return ASHAScheduler("epoch", "gain", "max", max_t=last, reduction_factor=3, stop_last_trials=False)


def _drive(
    config: dict[str, Any], task: str, source: bytes, num_workers: int, resources: dict[str, float],
    environment: dict[str, str],
) -> None:  # fmt: skip
    """A trial: train its run, in this process or on a group of workers of its own, and tell Tune of each epoch, without
    test figures.
    """
    import torch
    from ray import tune

    settings = recipe_from_source(task, source).settings_type(**config["settings"])
    path = Path(settings.runs_dir) / str(settings.name)
    folder = RunFolder(path)
    epoch, warnings = 0, []

    def tell(event: Event | Placed) -> None:
        nonlocal epoch, warnings
        match event:
            case Placed():
                tune.report({"epoch": epoch, "placement_group": event.placement_group})
            case Warned():
                warnings.append(event.text)
            case EpochEnded() if is_compared(settings, event.row):
                epoch += 1
                tune.report({"epoch": epoch, "gain": gain_of(settings, event.row), "warnings": warnings})
                warnings = []

    try:
        with folder.locked():
            (path / ENDED).unlink(missing_ok=True)
            epoch = sum(is_compared(settings, row) for row in folder.rows())
            if num_workers == 1:
                os.environ.update(environment)
                fit_here(task, settings, tell, None if "GPU" in resources else torch.device("cpu"))
            else:
                with closing(train_group(task, settings, num_workers, resources, environment, {})) as events:
                    for event in events:
                        tell(event)
            if warnings:
                tune.report({"epoch": epoch, "warnings": warnings})
    except (UserError, RunError) as error:
        note_end(path, failed=str(error))


def _watcher(board: Board) -> Any:
    """Tells the board what Tune does with the trials, in the place of Tune's own way to tell."""
    from ray.tune.progress_reporter import TrialProgressCallback

    class Watcher(TrialProgressCallback):
        def __init__(self, board: Any) -> None:
            self.board = board
            self.placement_groups: dict[str, str] = {}

        def __reduce__(self) -> Any:  # Tune saves itself with its callbacks, to be restored elsewhere: never used here
            return Watcher, (None,)

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            self.board.started(_name(trial))

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any) -> None:
            if "placement_group" in result:
                self.placement_groups[_name(trial)] = result["placement_group"]
            for warning in result.get("warnings", []):
                self.board.warn(f"{_name(trial)}: {warning}")
            if "gain" in result:
                self.board.judged(_name(trial))

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            _free(self.placement_groups.get(_name(trial)))
            self.board.ended(_name(trial))

        def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            _free(self.placement_groups.get(_name(trial)))
            self.board.warn(f"{_name(trial)}: {_why(trial)}; it goes on from its last checkpoint")

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            _free(self.placement_groups.get(_name(trial)))
            self.board.ended(_name(trial), died=_why(trial))

    return Watcher(board)


def _name(trial: Any) -> str:
    return str(trial.config["settings"]["name"])


def _free(placement_group: str | None) -> None:
    """Give back what a trial's workers held. Train does so where it ends by itself, not where Tune ends its trial."""
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    if placement_group is not None:
        group = PlacementGroup(ray.PlacementGroupID(bytes.fromhex(placement_group)))
        if placement_group_table(group).get("state", "REMOVED") != "REMOVED":
            remove_placement_group(group)


def _why(trial: Any) -> str:
    """Why a trial's own process ended; what it knows of its run, it has written itself."""
    from ray.exceptions import ActorDiedError

    error = trial.get_pickled_error()
    if error is None or isinstance(error, ActorDiedError):
        return "its process died, or was killed for memory"
    return last_line(error)
