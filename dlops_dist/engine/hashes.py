"""Hashes of the weights that some steps leave: one for any number of ranks where these give the same bits."""

import hashlib
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dlops_dist.config import recipe_from_source
from dlops_dist.data.order import rank_part
from dlops_dist.distributed.collectives import rank, world_size
from dlops_dist.distributed.ranks import run_ranks
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.proof import batch_of, learner_of, samples_of
from dlops_dist.engine.samples import Samples

SHOWN = 12
"""Hexadecimal digits."""
WORKERS, MOVED, STEPS = (1, 2, 3, 4), (4, 1, 3), 6
"""How many train to a hash; how many do one after the other; how many steps."""
TIMEOUT_S = 1800


class Case(NamedTuple):
    """Some steps of a recipe."""

    name: str
    source: bytes
    values: dict[str, Any]
    """Settings."""
    batch_size: int


class Hashed(NamedTuple):
    """What some steps of a case leave."""

    hash: str
    state: bytes
    """To go on from, on any number of ranks."""
    rounding: str | None
    """Why other numbers of workers may give other bits; None where they must not."""


def ours(cases: Sequence[Case], tell: Callable[[str], None]) -> dict[str, list[Hashed]]:
    """{who computed: what each case leaves}: numbers of workers, and a run that moves from one to another."""
    columns = {}
    for number in WORKERS:
        who = f"{number} worker{'s' * (number > 1)}"
        tell(who)
        columns[who] = _on_ranks(hashed_after, number, cases, range(STEPS))
    tell("a run that moves")
    states, done = None, 0
    for number in MOVED:
        steps = range(done, done + STEPS // len(MOVED))
        found = _on_ranks(hashed_after, number, cases, steps, states)
        states, done = [hashed.state for hashed in found], steps.stop
    return columns | {", then ".join(map(str, MOVED)): found}


def under_ddp(cases: Sequence[Case], tell: Callable[[str], None]) -> list[list[str]]:
    """Of each case, the hashes of as many workers."""
    tell("torch's DDP")
    of_workers = (_on_ranks(hashes_under_ddp, number, cases, range(STEPS)) for number in WORKERS)
    return [list(of_case) for of_case in zip(*of_workers, strict=True)]


def _on_ranks(function: Callable[..., Any], number: int, *arguments: Any) -> Any:
    return run_ranks(function, number, *arguments, timeout_s=TIMEOUT_S)[0]


def hashed_after(cases: Sequence[Case], steps: range, states: Sequence[bytes | None] | None = None) -> list[Hashed]:
    """On each rank."""
    found = []
    for case, state in zip(cases, states or [None] * len(cases), strict=True):
        learner, samples = _opened(case)
        if state is not None:
            learner.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
        for step in steps:
            learner.step([batch_of(learner, samples, case.batch_size, step)], 0, step)
        file = io.BytesIO()
        torch.save(learner.state_dict(), file)
        found.append(Hashed(_hash(learner), file.getvalue(), learner.plan.rounding))
    return found


def hashes_under_ddp(cases: Sequence[Case], steps: range) -> list[str]:
    """Of a loop as it is usually written: torch's DDP, each rank's own samples alone in its losses and batch norms."""
    found = []
    for case in cases:
        learner, samples = _opened(case)
        network = DistributedDataParallel(learner.network) if world_size() > 1 else learner.network
        optimizer = torch.optim.SGD(network.parameters(), learner.settings.optimizer.lr)
        for step in steps:
            batch = batch_of(learner, samples, case.batch_size, step, whole=True)
            part = learner.viewed(batch.part_of(rank_part(len(batch.labels), rank(), world_size()), learner.reads_next))
            seen = learner.seen(part, 0)
            outputs = learner.outputs(network, seen.inputs)
            value: Tensor | float = 0.0
            for name, weight in learner.loss.backward_weights.items():
                loss: Any = learner.loss[name]
                labels = seen.targets if loss.sees == "own" else part.labels[part.part]
                value = value + weight * loss.terms(outputs[str(loss.reads)], labels).mean()
            optimizer.zero_grad()
            torch.as_tensor(value).backward()
            optimizer.step()
        found.append(_hash(learner))
    return found


def _opened(case: Case) -> tuple[Learner, Samples]:
    settings = recipe_from_source(case.name, case.source).settings_type(**case.values)
    samples = samples_of(settings)
    return learner_of(settings, samples), samples


def _hash(learner: Learner) -> str:
    """Of the weights, running statistics and what losses keep."""
    content = hashlib.sha256()
    for value in (*learner.model.state_dict().values(), *learner.loss.state_dict().values()):
        content.update(value.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()[:SHOWN]
