"""What a step of ours computes on each rank, and beside it what usual formulations of the same step compute."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DistributedSampler

from dlops_dist.config import DEFAULT, load_recipe
from dlops_dist.data.loader import Batch
from dlops_dist.data.order import rank_part, uniform_epoch
from dlops_dist.data.shapes import draw
from dlops_dist.distributed.collectives import all_sum, gather, rank, world_size
from dlops_dist.distributed.objective import global_objective
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.samples import Inputs

NUM_SAMPLES, NUM_CLASSES, NUM_STEPS = 21, 5, 5
"""21 samples: no number of workers but 3, 7 and 21 shares them evenly."""
EPOCH_SIZE = 1001
OURS = "ours"


def measure() -> dict[tuple[str, str], Any]:
    """(what, how): tensor that must not depend on the number of ranks, as this rank has it. Called on each rank."""
    ce, triplet, center, own_center = "cross-entropy", "triplet loss", "centre loss", "its centres"
    return {
        (ce, OURS): _our_gradient("ce"),
        (ce, "mean of each worker's mean"): _gradient("ce", _local_means),
        (ce, "each worker's batch norm"): _our_gradient("ce", norm="local"),
        (triplet, OURS): _our_gradient("triplet"),
        (triplet, "mined in each worker's part"): _gradient("triplet", _mined_locally),
        (triplet, "others' embeddings without gradient"): _gradient("triplet", _remotes_detached),
        (triplet, "whole loss on each worker"): _gradient("triplet", _whole_loss_averaged),
        (center, OURS): _our_gradient("center"),
        (center, "mean of each worker's mean"): _gradient("center", _local_means),
        (own_center, OURS): _our_centers(),
        (own_center, "each worker moves its own"): _own_centers(),
        ("ids of an epoch", OURS): _our_ids(),
        ("ids of an epoch", "DistributedSampler"): _sampler_ids(),
        **{(f"{NUM_STEPS} steps, {loss}", OURS): _change_of_weights(loss) for loss in ("ce", "triplet", "center")},
    }


def _learner(loss: str, norm: str = "sync") -> tuple[Any, Any]:
    """A learner with the weights of the seed, and this rank's part of a batch."""
    settings: Any = load_recipe(DEFAULT).settings_type
    settings = settings(
        loss=loss, precision="float64", model={"width": 8, "stem": "imagenet", "norm": norm},
        augment={"crop_padding": 0, "flip": False}, center={"weight": 1.0}, optimizer={"lr": 0.01, "warmup_epochs": 0},
    )  # fmt: skip
    inputs = Inputs(NUM_CLASSES, (0.5,) * 3, (0.25,) * 3)
    learner = Learner(settings, inputs, NUM_STEPS, torch.device("cpu"))
    labels = torch.arange(NUM_SAMPLES) % NUM_CLASSES
    part = rank_part(NUM_SAMPLES, rank(), world_size())
    ids = torch.arange(NUM_SAMPLES)[part]
    images = np.stack([draw(int(labels[i]), int(i), 64) for i in ids])
    return learner, Batch(torch.from_numpy(images), ids, labels, part, labels.numpy())


def _our_gradient(loss: str, norm: str = "sync") -> Any:
    learner, batch = _learner(loss, norm)
    learner.step([batch], 0, 0)
    return _flat_gradient(learner)


def _gradient(loss: str, formulation: Callable[..., Any]) -> Any:
    """Of a formulation on each rank's own part; DDP's mean over ranks."""
    learner, batch = _learner(loss)
    learner.network.train()
    embeddings, logits = learner.network(batch.images)
    formulation(learner.loss, embeddings, logits, batch).backward()
    for parameter in learner.model.parameters():
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = all_sum(own) / world_size()
    return _flat_gradient(learner)


def _flat_gradient(learner: Any) -> Any:
    """All gradients as one vector; without the head's, which a triplet loss does not train."""
    named = learner.model.named_parameters()
    return torch.cat([p.grad.flatten() for name, p in named if "triplet" not in learner.loss or "fc" not in name])


def _local_means(loss: Any, embeddings: Any, logits: Any, batch: Any) -> Any:
    labels = batch.labels[batch.part]
    mean = loss["ce"](logits, labels)
    return mean + loss["center"](embeddings, labels) if "center" in loss else mean


def _mined_locally(loss: Any, embeddings: Any, _: Any, batch: Any) -> Any:
    return loss["triplet"](embeddings, batch.labels[batch.part])


def _remotes_detached(loss: Any, embeddings: Any, _: Any, batch: Any) -> Any:
    terms = loss["triplet"].terms(_everyone_detached(embeddings, batch), batch.labels, batch.part)
    objective = global_objective({"triplet": terms}, {"triplet": 1.0})
    return terms.sum * objective.scales["triplet"] * world_size()


def _whole_loss_averaged(loss: Any, embeddings: Any, _: Any, batch: Any) -> Any:
    return loss["triplet"](_everyone_detached(embeddings, batch), batch.labels)


def _everyone_detached(embeddings: Any, batch: Any) -> Any:
    """All ranks' embeddings, this rank's own with gradient."""
    everyone = gather(embeddings.detach())
    return torch.cat([everyone[: batch.part.start], embeddings, everyone[batch.part.stop :]])


def _our_centers() -> Any:
    learner, batch = _learner("center")
    learner.step([batch], 0, 0)
    return learner.loss["center"].centers


def _own_centers() -> Any:
    learner, batch = _learner("center")
    learner.network.train()
    embeddings, _ = learner.network(batch.images)
    center = learner.loss["center"]
    center.update(center.sums(embeddings.detach(), batch.labels[batch.part]))
    return center.centers


def _our_ids() -> Any:
    """How often each sample is seen in an epoch, short last batch included."""
    size = 100
    steps = list(uniform_epoch(0, 0, EPOCH_SIZE, size, drop_last=False))
    own = [torch.from_numpy(ids[rank_part(len(ids), rank(), world_size())].copy()) for ids in steps]
    return torch.cat([gather(part) for part in own]).bincount(minlength=EPOCH_SIZE).double()


def _sampler_ids() -> Any:
    sampler: Any = DistributedSampler(range(EPOCH_SIZE), world_size(), rank())  # type: ignore[arg-type, var-annotated]
    return gather(torch.tensor(list(sampler))).bincount(minlength=EPOCH_SIZE).double()


def _change_of_weights(loss: str) -> Any:
    learner, batch = _learner(loss)
    before = [p.detach().clone() for p in learner.model.parameters()]
    for step in range(NUM_STEPS):
        learner.step([batch], 0, step)
    return torch.cat([(p.detach() - b).flatten() for p, b in zip(learner.model.parameters(), before, strict=True)])
