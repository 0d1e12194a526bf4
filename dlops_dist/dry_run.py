"""What a run would be: settings and where each is from, data, steps, sizes, folder. Nothing is started or written."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dlops_dist.command_line import SMOKE
from dlops_dist.config import Run, flat
from dlops_dist.data.shards import Manifest, read_manifest
from dlops_dist.engine import prepare
from dlops_dist.engine.prepare import stages_of
from dlops_dist.engine.rows import is_out_of_patience, rows_before
from dlops_dist.engine.run_folder import RunFolder
from dlops_dist.engine.samples import Samples
from dlops_dist.files import temporary_folder
from dlops_dist.smoke import with_smoke_shards

MEMORY = "weights, gradients, momenta and averages are counted; activations, images and libraries take more"


class Size(NamedTuple):
    """Of what a stage trains."""

    parameters: int
    trained: int
    """Values that a step changes: weights, those of losses too, and centres."""
    gathered: int
    """Outputs of each sample, embeddings or logits, that losses gather."""
    bytes_each: int
    exactness: str


def describe(task: str, settings: Run, origins: dict[str, str]) -> Iterator[str]:
    """Lines that tell it. Refuses settings and data as a run would."""
    with tempfile.TemporaryDirectory(dir=temporary_folder()) as scratch:
        if settings.smoke:  # the images are made, looked at and forgotten
            generated = with_smoke_shards(task, settings.model_copy(update={"runs_dir": scratch}))
            settings = settings.model_copy(update={"data": generated.data})
        settings = prepare(task, settings)
        shards = Path(settings.data.shards)
        manifest = read_manifest(shards)
        samples = Samples(shards, manifest, settings)
        stages = stages_of(settings, samples, torch.device("meta"))
        sizes = [size_of(stage.learner(), len(manifest.classes)) for stage in stages]
        progress = progress_of(settings, manifest)
    yield "settings:"
    values = flat(settings.model_dump())
    if settings.smoke:
        values["data.shards"], origins = f"{settings.runs_dir}/{shards.name}", {**origins, "data.shards": SMOKE}
    for name, value in values.items():
        yield f"  {name}: {value}  ({origins.get(name, 'default')})"
    counts = {
        "train": len(samples.ids), "held out": len(samples.val_ids), "test": len(samples.test),
        "unlabeled": len(samples.unlabeled or ()),
    }  # fmt: skip
    splits = ", ".join(f"{number:,} {name}" for name, number in counts.items() if number)
    image = "x".join(map(str, samples.inputs.image_size))
    yield f"data: {manifest.dataset}, id {manifest.id[:12]}, {len(manifest.classes)} classes, {image}: {splits}"
    for stage, size in zip(stages, sizes, strict=True):
        epochs, steps = stage.epochs, stage.order.steps_per_epoch
        yield f"{stage.name or 'steps'}: {steps:,} an epoch, {epochs * steps:,} in {epochs} epoch{'s' * (epochs > 1)}"
        yield f"  parameters: {size.parameters:,}; values trained, with those of losses: {size.trained:,}"
        yield f"  exactness: {size.exactness}"
        yield f"  exchange: {exchange_of(size, settings)}"
        yield f"  memory: {held_by(size, settings) / 1e6:,.1f} MB in each worker"
    steps = sum(stage.epochs * stage.order.steps_per_epoch for stage in stages)
    yield f"in all: {steps:,} steps, {sum(stage.epochs for stage in stages)} epochs"
    yield f"memory: {MEMORY}"
    yield f"run: {RunFolder.of(settings)} {progress}"


def size_of(learner: Any, num_classes: int) -> Size:
    own = list(learner.model.parameters())
    moved = [t for t in learner.equal_on_all_ranks().values() if t.requires_grad or not isinstance(t, nn.Parameter)]
    read = {loss.reads for loss in learner.loss.modules() if getattr(loss, "sees", "own") == "all"}
    gathered = sum(num_classes if name == "logits" else learner.model.embedding_dim for name in read)
    numbers = sum(p.numel() for p in own), sum(t.numel() for t in moved), gathered, own[0].element_size()
    return Size(*numbers, learner.plan.promise)


def exchange_of(size: Size, settings: Run) -> str:
    """Bytes that a step adds up over all workers: a gradient, or what moves a centre, for each value that is trained;
    and of each sample what losses gather, with its gradient. Sums of norms are not among them.
    """
    if settings.local or settings.workers == 1:
        return "0 bytes: there is one worker"
    gathered = f" + 2 x {settings.global_batch_size} samples x {size.gathered} outputs gathered" * bool(size.gathered)
    number = size.bytes_each * (size.trained + 2 * settings.global_batch_size * size.gathered)
    alone = "" if settings.workers else "; 0 where there is one worker"
    return f"{number:,} bytes a step, {size.bytes_each} x ({size.trained:,} values trained{gathered}){alone}"


def held_by(size: Size, settings: Run) -> int:
    """Bytes that a worker holds, whatever is in a batch."""
    weights, state = 1 + (settings.ema_decay > 0), 1 + (settings.optimizer.momentum > 0)
    return size.bytes_each * (size.parameters * weights + size.trained * state)


def progress_of(settings: Run, manifest: Manifest) -> str:
    """How far the run in the folder has come; refuses one of other settings or data."""
    state = RunFolder.of(settings).load(
        settings, manifest.id, torch.device("cpu"), lambda text: print(f"warning: {text}", file=sys.stderr)
    )
    if state is None:
        return "would begin"
    over = state["epoch"] >= settings.total_epochs(manifest.num_folds)
    over = over or is_out_of_patience(rows_before(state), settings)
    return "is complete" if over else f"would go on from step {state['step']}"
