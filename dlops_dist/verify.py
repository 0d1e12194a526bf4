"""Show on this machine that any number of workers computes what one computes, and what usual formulations give.

    python -m dlops_dist.verify
    python -m dlops_dist.verify --workers 1 2 3
    python -m dlops_dist.verify my.py --data.shards shards/mine       your own recipe, on your shards
    python -m dlops_dist.verify my.py                                 on generated images

Trains a step in float64, in processes that talk through gloo, and prints the relative difference to one worker. Of a
recipe it shows losses, gradients, statistics, metrics and a resume, and names what is inexact in it; its settings may
follow, as for `train`. Exit code 1 where something differs by more than promised.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dlops_dist.errors import OneLineParser, RunError, UserError, exit_code_of

ONE_STEP, SEVERAL_STEPS = 1e-12, 1e-6
DIVIDED = 1e-9
"""Of a step by a recipe's own optimiser: where a gradient is nothing but rounding, Adam divides it by its own size."""
NUM_SAMPLES, NUM_CLASSES, NUM_STEPS = 21, 5, 5
"""21 samples: no number of workers but 3, 7 and 21 shares them evenly."""
EPOCH_SIZE = 1001
OURS = "ours"
TIMEOUT_S = 120
RECIPE_TIMEOUT_S = 1800
"""A user's model may be large, and one core computes ten steps of it."""


def main() -> None:
    parser = OneLineParser(
        prog="python -m dlops_dist.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", help="file of a recipe, or its module's name")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 2, 4], metavar="W", help="numbers of workers (default: 1 2 4)"
    )
    arguments, settings = parser.parse_known_args()
    workers = sorted(set(arguments.workers))
    if not 1 <= workers[0] <= workers[-1] <= NUM_SAMPLES:
        raise UserError(f"--workers: each must be from 1 to {NUM_SAMPLES}, not {workers}")

    from rich.console import Console

    from dlops_dist.distributed.ranks import run_ranks

    console = Console()
    if arguments.recipe:
        verify_recipe(arguments.recipe, settings, workers, console)
        return
    if settings:
        raise UserError(f"unknown setting {settings[0]}; those of a recipe follow its file")
    results: dict[int, dict[tuple[str, str], Any]] = {}
    with console.status("") as status:
        for number in sorted({1, *workers}):
            status.update(f"computing with {number} worker{'s' * (number > 1)}")
            results[number] = run_ranks(measure, number, timeout_s=TIMEOUT_S)[-1]
    rows: dict[tuple[str, str], Sequence[float]]
    rows = {key: [_difference(results[w][key], results[1][key[0], OURS]) for w in workers] for key in results[1]}
    console.print(_table(rows, workers))
    wrong = [what for (what, how), errors in rows.items() if how == OURS and max(errors) > _limit(what)]
    if wrong:
        raise RunError(
            f"more than promised: {', '.join(wrong)}; please report it, with 'python -m torch.utils.collect_env'"
        )
    print(f"result: {', '.join(map(str, workers))} workers compute what one computes")


def verify_recipe(name: str, arguments: Sequence[str], workers: Sequence[int], console: Any) -> None:
    """Print how far each number of workers is from one, for a user's recipe; name what is inexact."""
    import tempfile

    from dlops_dist.command_line import read_settings
    from dlops_dist.config import load_recipe
    from dlops_dist.distributed.ranks import run_ranks
    from dlops_dist.engine.prepare import resolved
    from dlops_dist.engine.proof import causes, measure
    from dlops_dist.files import temporary_folder
    from dlops_dist.smoke import with_smoke_shards

    recipe, settings = load_recipe(name), read_settings(name, arguments)
    with tempfile.TemporaryDirectory(dir=temporary_folder()) as folder:
        given = any(argument.startswith(("--data.shards", "--config")) for argument in arguments)
        if not given:
            settings = with_smoke_shards(name, settings.model_copy(update={"runs_dir": folder}))
        data = {"shards": str(resolved(settings.data.shards)), "reader": "decode"}
        values = settings.model_copy(update={
            "precision": "float64", "compile": False, "micro_batch_size": None, "global_batch_size": NUM_SAMPLES,
            "data": settings.data.model_copy(update=data),
        }).model_dump()  # fmt: skip
        chosen = (name, recipe.source, values, NUM_SAMPLES)
        inexact = causes(*chosen)
        for cause in inexact:
            console.print(f"inexact: {cause}", markup=False, soft_wrap=True)
        results: dict[int, Any] = {}
        with console.status("") as status:
            for number in sorted({1, *workers}):
                status.update(f"computing with {number} worker{'s' * (number > 1)}")
                try:
                    results[number] = run_ranks(measure, number, *chosen, timeout_s=RECIPE_TIMEOUT_S)[0]
                except RunError as error:
                    if not inexact:
                        raise
                    why = str(error).strip().splitlines()[-1]
                    raise RunError(f"{recipe.name} depends on the number of workers: see above ({why})") from None
    alone = results[1][0]
    rows = {what: [_difference_of(results[w][0][what], alone[what]) for w in workers] for what in alone}
    rows["a resume, to the bit"] = [0.0 if results[w][1] else 1.0 for w in workers]
    console.print(_table({(what, OURS): errors for what, errors in rows.items()}, workers))
    wrong = [what for what, errors in rows.items() if not max(errors) <= _limit(what)]
    if wrong or inexact:
        raise RunError(f"{recipe.name} depends on the number of workers: {', '.join(wrong) or 'see above'}")
    print(f"result: {', '.join(map(str, workers))} workers compute what one computes")


def _difference_of(ours: Any, expected: Any) -> float:
    """Relative; 0 where both are nothing, or nothing but zeros or NaN alike."""
    if ours is None or expected is None:
        return 0.0 if ours is expected else 1.0
    scale = float(expected.nan_to_num().norm())
    difference = float((ours.nan_to_num() - expected.nan_to_num()).norm())
    return difference / scale if scale else difference


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
    import numpy as np
    import torch

    from dlops_dist.config import DEFAULT, load_recipe
    from dlops_dist.data.loader import Batch
    from dlops_dist.data.order import rank_part
    from dlops_dist.data.shapes import draw
    from dlops_dist.distributed.collectives import rank, world_size
    from dlops_dist.engine.learner import Learner
    from dlops_dist.engine.samples import Inputs

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
    import torch

    from dlops_dist.distributed.collectives import all_sum, world_size

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
    import torch

    named = learner.model.named_parameters()
    return torch.cat([p.grad.flatten() for name, p in named if "triplet" not in learner.loss or "fc" not in name])


def _local_means(loss: Any, embeddings: Any, logits: Any, batch: Any) -> Any:
    labels = batch.labels[batch.part]
    mean = loss["ce"](logits, labels)
    return mean + loss["center"](embeddings, labels) if "center" in loss else mean


def _mined_locally(loss: Any, embeddings: Any, _: Any, batch: Any) -> Any:
    return loss["triplet"](embeddings, batch.labels[batch.part])


def _remotes_detached(loss: Any, embeddings: Any, _: Any, batch: Any) -> Any:
    from dlops_dist.distributed.objective import global_objective

    terms = loss["triplet"].terms(_everyone_detached(embeddings, batch), batch.labels, batch.part)
    objective = global_objective({"triplet": terms}, {"triplet": 1.0})
    return objective.sums[0] * objective.scales[0]


def _whole_loss_averaged(loss: Any, embeddings: Any, _: Any, batch: Any) -> Any:
    return loss["triplet"](_everyone_detached(embeddings, batch), batch.labels)


def _everyone_detached(embeddings: Any, batch: Any) -> Any:
    """All ranks' embeddings, this rank's own with gradient."""
    import torch

    from dlops_dist.distributed.collectives import gather

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
    import torch

    from dlops_dist.data.order import last_batch, rank_part, uniform_epoch
    from dlops_dist.distributed.collectives import gather, rank, world_size

    size = 100
    steps = [*uniform_epoch(0, 0, EPOCH_SIZE, size), last_batch(0, 0, EPOCH_SIZE, size)]
    own = [torch.from_numpy(ids[rank_part(len(ids), rank(), world_size())].copy()) for ids in steps]
    return torch.cat([gather(part) for part in own]).bincount(minlength=EPOCH_SIZE).double()


def _sampler_ids() -> Any:
    import torch
    from torch.utils.data import DistributedSampler

    from dlops_dist.distributed.collectives import gather, rank, world_size

    sampler: Any = DistributedSampler(range(EPOCH_SIZE), world_size(), rank())  # type: ignore[arg-type, var-annotated]
    return gather(torch.tensor(list(sampler))).bincount(minlength=EPOCH_SIZE).double()


def _change_of_weights(loss: str) -> Any:
    import torch

    learner, batch = _learner(loss)
    before = [p.detach().clone() for p in learner.model.parameters()]
    for step in range(NUM_STEPS):
        learner.step([batch], 0, step)
    return torch.cat([(p.detach() - b).flatten() for p, b in zip(learner.model.parameters(), before, strict=True)])


def _difference(ours: Any, expected: Any) -> float:
    return float((ours - expected).norm() / expected.norm())


def _limit(what: str) -> float:
    return SEVERAL_STEPS if "steps" in what else DIVIDED if what.startswith("step of the weights by") else ONE_STEP


def _table(rows: dict[tuple[str, str], Sequence[float]], workers: Sequence[int]) -> Any:
    from rich.table import Table

    several = any(how != OURS for _, how in rows)
    table = Table("", *["computed as"] * several, title="relative difference to one worker")
    for number in workers:
        table.add_column(f"{number} worker{'s' * (number > 1)}", justify="right")
    for (what, how), errors in rows.items():
        style = ("green" if max(errors) <= _limit(what) else "bold red") if how == OURS else None
        shown = [f"{e:.0e}" if e else "0" for e in errors]
        table.add_row(what if how == OURS else "", *[how] * several, *shown, style=style)
    return table


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
