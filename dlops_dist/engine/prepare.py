"""A run before it begins: where it lies, what it is made of, and whether that fits together."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dlops_dist.config import Run, check_task, default_name, stem_of
from dlops_dist.data.shards import REMOTE, read_manifest
from dlops_dist.engine.exactness import workers_of
from dlops_dist.engine.recipe import code_of, made, mistakes_placed
from dlops_dist.engine.run_folder import RunFolder
from dlops_dist.engine.samples import Samples
from dlops_dist.engine.stages import Stage, training
from dlops_dist.engine.warm_start import fitting_weights
from dlops_dist.errors import UserError
from dlops_dist.files import is_url


def prepare(task: str, settings: Run) -> Run:
    """Settings with name and paths filled in. Refuses what does not fit together; writes nothing."""
    settings = located(task, settings)
    shards = Path(settings.data.shards)
    stages = stages_of(settings, Samples(shards, read_manifest(shards), settings), torch.device("meta"))
    if settings.freeze or settings.init_from is not None or workers_of(settings) > 1:
        _check_beginning(settings, stages)
    return settings


def _check_beginning(settings: Run, stages: Sequence[Stage]) -> None:
    """Refuse parts to freeze that are not there, more workers than blocks, and weights that do not fit, where they are
    still to be begun with.
    """
    with mistakes_placed(settings):
        models = [stage.learner().model for stage in stages]
    if settings.init_from is not None and not RunFolder.of(settings).checkpoints.steps():
        fitting_weights(settings.init_from, models[-1], lambda _: None)


def located(task: str, settings: Run) -> Run:
    """Settings with name and paths filled in."""
    shards = resolved(settings.data.shards)
    manifest = read_manifest(shards)
    check_task(task, settings)
    if settings.patience is not None and not settings.data.val_fraction:
        raise UserError("patience: data.val_fraction 0 holds nothing of train out to judge by")
    name = settings.name or default_name(stem_of(task), settings, manifest.id)
    cache = settings.data.cache_dir and str(Path(settings.data.cache_dir).absolute())
    data = settings.data.model_copy(update={"shards": str(shards), "cache_dir": cache})
    runs_dir = settings.runs_dir if is_url(settings.runs_dir) else str(Path(settings.runs_dir).absolute())
    return settings.model_copy(update={"name": name, "runs_dir": runs_dir, "data": data})


def resolved(shards: str) -> Path:
    """The folder of data.shards. What is no folder is refused: nothing is run, and nothing fetched yet."""
    if REMOTE.match(shards):
        raise UserError(f"data.shards: {shards} must be a folder; nothing is run or fetched")
    return Path(shards).absolute()


def stages_of(
    settings: Run, samples: Samples, device: torch.device, tell: Callable[[str], None] = lambda text: None
) -> list[Stage]:
    """The stages of a run; to be looked at alone on the device "meta". Refuses settings and data that do not fit."""
    code = code_of(settings)
    if not hasattr(code, "stages"):
        recipe = made(settings, samples.inputs, dry=device.type == "meta")
        return [training(settings, samples, recipe, device)]
    for name in ("init_from", "patience"):
        if getattr(settings, name) is not None:
            raise UserError(f"{name}: a run of several stages trains each from its own beginning to its end")
    return code.stages(settings, samples, device, tell)  # type: ignore[no-any-return]
