"""Whether a step of anybody's recipe depends on the number of ranks, and what in it makes it depend."""

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlops_dist.config import Run, recipe_from_source
from dlops_dist.data.loader import Batch, read_ahead
from dlops_dist.data.order import Ids
from dlops_dist.data.shards import read_manifest
from dlops_dist.distributed.exact import whatever_is_inexact
from dlops_dist.engine.evaluation import evaluate, judged_alone, sees_own
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.losses import hints
from dlops_dist.engine.samples import Samples
from dlops_dist.losses.terms import Terms
from dlops_dist.optim import SGD

CPU = torch.device("cpu")
OF_A_CLASS = 3
"""Samples of each class in a batch: anchors, positives and negatives for whatever is mined."""
JUDGED = 300
"""Test samples, more than a block."""
SUMS = 1e-9
"""By how much, as a part of it, parts of a loss may miss the whole."""

Measured = dict[str, Tensor | None]


def measure(name: str, source: bytes, values: dict[str, Any], batch_size: int) -> tuple[Measured, bool]:
    """What a step from the seed's weights, and an evaluation, leave on this rank; whether a resume changed no bit."""
    settings = recipe_from_source(name, source).settings_type(**values)
    samples = samples_of(settings)
    learner = learner_of(settings, samples)
    batch = batch_of(learner, samples, batch_size, 0)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    learner.step([batch], 0, 0)
    found = dict(_found(learner, before))
    test = np.arange(min(JUDGED, len(samples.test)))
    found |= {f"test {name}": _number(value) for name, value in evaluate(learner, samples.test, test).items()
              if value is None or isinstance(value, float)}  # fmt: skip
    return found, _resumes(settings, samples, batch_size)


def _found(learner: Learner, before: dict[str, Tensor]) -> Iterator[tuple[str, Tensor | None]]:
    """Figures, gradients by the model's parts, what moved in it, and the state of its losses."""
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in learner.model.named_parameters():
        part = ".".join(name.split(".")[:-1][:2]) or name
        gradients.setdefault(part, []).append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    parameters = dict(learner.model.named_parameters())
    state = learner.model.state_dict()
    buffers = [n for n in state if n not in parameters and state[n].is_floating_point()]
    losses = [value for value in learner.loss.state_dict().values() if value.is_floating_point()]
    yield from ((f"train {name}", _number(value)) for name, value in learner.end_epoch().items())
    yield from ((f"gradient of {part}", _flat(of_part)) for part, of_part in gradients.items())
    optimizer = learner.optimizer
    by = "" if isinstance(optimizer, SGD) else f" by {type(optimizer).__name__}"
    yield f"step of the weights{by}", _flat([state[name] - before[name] for name in parameters])
    if buffers:
        yield "running statistics", _flat([state[name] for name in buffers])
    if losses:
        yield "weights and state of losses", _flat(losses)


def _resumes(settings: Run, samples: Samples, batch_size: int) -> bool:
    """Whether two steps, a checkpoint and one more leave the bits of three."""
    states = []
    for stop in (None, 2):
        learner = learner_of(settings, samples)
        for step in range(3):
            if step == stop:
                state = copy.deepcopy(learner.state_dict())
                learner = learner_of(settings, samples)
                learner.load_state_dict(state)
            learner.step([batch_of(learner, samples, batch_size, step)], 0, step)
        states.append(_flat([*learner.model.state_dict().values(), *learner.loss.state_dict().values()]))
    return bool(torch.equal(*states))


def causes(name: str, source: bytes, values: dict[str, Any], batch_size: int) -> list[str]:
    """What in a recipe depends on how samples are shared among ranks, by name, and what to do. In one process."""
    settings = recipe_from_source(name, source).settings_type(**values)
    samples = samples_of(settings)
    learner = learner_of(settings, samples)
    batch = batch_of(learner, samples, batch_size, 0)
    images = learner.network.normalize(batch.images[: len(batch.labels)])
    found = [f"model: {text}" for text in whatever_is_inexact(learner.model, images)]
    with torch.no_grad():
        embeddings = learner.model.eval().embed(images)
        outputs = {"embeddings": embeddings, "logits": learner.model.fc(embeddings)}
    found += [f"augment {text}" for text in _of_augmentation(learner, batch)]
    found += [f"metrics[{name!r}] {text}" for name, text in _of_metrics(learner, outputs, batch.labels)]
    third = len(batch.labels) // 3
    for loss_name, loss in learner.loss.items():
        parts = [slice(0, third), slice(third, len(batch.labels))]
        whole, sums = _of_parts(loss, outputs[str(loss.reads)], batch, parts)
        if abs(sums - whole) > SUMS * max(abs(whole), SUMS):
            found.append(
                f"losses[{loss_name!r}]: the sums of two parts' terms over their counts are {sums:.6g}, of the whole "
                f"batch {whole:.6g}: terms must give a sum and a count, and not divide by the batch they are given"
            )
    return found


def _of_augmentation(learner: Learner, batch: Batch) -> Iterator[str]:
    """What a sample's changes depend on besides its key."""
    images, half = batch.images[: len(batch.labels)], slice(0, len(batch.labels) // 2)
    changed = []
    for seed, part in ((0, slice(None)), (1, slice(None)), (0, half)):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        changed.append(learner.augment(images[part], batch.ids[: len(images)][part], 0))
    if not torch.equal(changed[0], changed[1]):
        yield "changes with a random state of its own: draw from the numbers that Keyed(function, num_draws) is given"
    elif not torch.equal(changed[0][half], changed[2]):
        yield "depends on which other samples are in the batch: change each image by its own numbers alone"


@torch.no_grad()
def _of_metrics(learner: Learner, outputs: dict[str, Tensor], labels: Tensor) -> Iterator[tuple[str, str]]:
    """Metrics that give a sample another number where the samples come in another order."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    for name, metric in learner.metrics.items():
        values = []
        for places in (torch.arange(len(labels)), order):
            block = judged_alone(learner, {k: x[places] for k, x in outputs.items()}, labels[places])
            none = block.logits[:, :0]
            values.append(metric(block if sees_own(metric) else block._replace(logits=none)).double())
        if not torch.allclose(values[0][order], values[1], rtol=SUMS, atol=SUMS, equal_nan=True):
            yield name, "depends on the order of the samples: give each one a number of its own"


@torch.no_grad()
def _of_parts(loss: Any, x: Tensor, batch: Batch, parts: list[slice]) -> tuple[float, float]:
    """The loss of the whole batch, and that of the added terms of its parts."""
    every = slice(0, len(x))
    if loss.sees == "all":
        more = hints(loss, batch.host_labels)
        whole, *own = (loss.terms(x, batch.labels, part, **more) for part in (every, *parts))
    else:
        whole, *own = (loss.terms(x[part], batch.labels[part]) for part in (every, *parts))
    return _mean([whole]), _mean(own)


def _mean(terms: list[Terms]) -> float:
    return float(sum(float(t.sum) for t in terms) / max(sum(float(t.count) for t in terms), 1.0))


def samples_of(settings: Run) -> Samples:
    shards = Path(settings.data.shards)
    return Samples(shards, read_manifest(shards), settings)


def learner_of(settings: Run, samples: Samples) -> Learner:
    return Learner(settings, samples.inputs, 3, CPU)


def batch_of(learner: Learner, samples: Samples, size: int, step: int, whole: bool = False) -> Batch:
    """This rank's part of a step's global batch, or the whole: some samples of each of some classes."""
    labels = samples.train.labels[samples.ids]
    chosen: list[Ids] = []
    for label in np.unique(labels):
        own = np.roll(samples.ids[labels == label], -step * OF_A_CLASS)[:OF_A_CLASS]
        chosen.append(own)
    ids = np.concatenate(chosen)[:size]
    part = slice(0, len(ids)) if whole else learner.blocks.share(len(ids))
    (batch,) = read_ahead(learner.in_epoch(samples.train, 0), [(ids, part)], CPU, 1, 1, learner.reads_next)
    return batch


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def _number(value: float | None) -> Tensor | None:
    return None if value is None else torch.tensor([value], dtype=torch.float64)
