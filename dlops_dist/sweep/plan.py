"""The trials of a sweep, as runs that are ready to be trained."""

from collections.abc import Iterator, Sequence

from dlops_dist.config import Point, Run, Sweep, trial_settings
from dlops_dist.engine import prepare
from dlops_dist.engine.run_folder import RunFolder
from dlops_dist.sweep.folder import SweepFolder
from dlops_dist.sweep.points import points_of
from dlops_dist.sweep.ranking import ranking


def known_trials(task: str, sweep: Sweep, folder: SweepFolder) -> list[Run]:
    """The runs that are known beforehand: all of a random search, of Optuna's those that were begun.

    None of them twice: draws from an interval of whole numbers meet.
    """
    if sweep.search == "random":
        points = points_of(sweep.parameters, sweep.num_samples, sweep.seed)
    else:
        points = [ranked.point for ranked in ranking(folder.trials())] if folder.is_sweep() else []
    runs = [settings for point in points for settings in _runs_of(point, task, sweep, folder)]
    return list({settings.name: settings for settings in runs}.values())


def suggested_trials(task: str, sweep: Sweep, folder: SweepFolder) -> Iterator[Run]:
    """The runs of the points that Optuna suggests, each by what has come of the others when it is wanted.

    A space that is exhausted ends them early.
    """
    from dlops_dist.sweep.suggestions import suggest

    for attempt in range(sweep.num_samples * 10):
        ranked = ranking(folder.trials())
        if len(ranked) >= sweep.num_samples:
            return
        scored = [(r.point, r.mean or 0.0) for r in ranked if r.finished or any(t.failed for t in r.trials)]
        point = suggest(sweep.parameters, scored, sweep.seed + len(ranked) + attempt)
        trials = _runs_of(point, task, sweep, folder)
        if str(trials[0].name) not in [trial.name for other in ranked for trial in other.trials]:
            create(task, trials)
            yield from trials


def create(task: str, trials: Sequence[Run]) -> None:
    """Make the folders of runs, so that the sweep's tables show them before they begin."""
    for settings in trials:
        RunFolder.of(settings).create(task, settings)


def _runs_of(point: Point, task: str, sweep: Sweep, folder: SweepFolder) -> list[Run]:
    """One for each seed, in a folder that is named by what makes its result."""
    inside = sweep.model_copy(update={"runs_dir": str(folder.path)})
    seeds = range(sweep.seed, sweep.seed + sweep.seeds)
    return [prepare(task, trial_settings(inside, point, seed)) for seed in seeds]
