"""Whole training, 1 process against 2, 3 and 4 ranks: the promise that the project exists for."""

import json
import random
import shutil
from functools import cache
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from covering import covering
from kept_ranks import on_ranks
from states import distance, nearly, same_state, tensors, with_total_sums

from dlops_dist.data.loader import read_ahead
from dlops_dist.data.order import blocks
from dlops_dist.data.shards import Split, read_manifest
from dlops_dist.distributed.collectives import rank
from dlops_dist.distributed.ranks import run_ranks
from dlops_dist.engine import evaluation, fit, prepare
from dlops_dist.engine.fit import _Fit
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.run_folder import RunFolder
from dlops_dist.engine.samples import Inputs
from dlops_dist.errors import RunError
from dlops_dist.events import Started
from dlops_dist.recipes.q1 import Settings as Q1

LOSSES = {
    "ce": {
        "loss": "ce", "ce": {"label_smoothing": 0.1}, "optimizer": {"lr": 0.02, "clip_norm": 1.0}, "ema_decay": 0.9,
        "flip_test": True,
    },
    "center": {
        "loss": "center", "data": {"drop_last": False}, "optimizer": {"lr": 0.02}, "micro_batch_size": 11,
    },
    "batch-hard": {"loss": "triplet", "optimizer": {"lr": 0.002, "nesterov": True}, "micro_batch_size": 10},
    "semi-hard": {
        "loss": "triplet", "triplet": {"mining": "semi-hard", "average": "active"}, "optimizer": {"lr": 0.002},
    },
    "all": {
        "loss": "triplet", "triplet": {"mining": "all", "ce_weight": 0.5}, "data": {"order": "uniform"},
        "optimizer": {"lr": 0.002},
        "augment": {"resized_crop": 0.4, "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "cutout": 8},
    },
}  # fmt: skip
"""Learning rates at which a run is stable: elsewhere two correct runs drift apart tenfold with each step."""


def settings_of(loss, shards, runs, val_fraction=0.1, **changes):
    """Two epochs of about ten float64 steps; 22 samples a step, which neither 3 nor 4 ranks share evenly."""
    batch = {"samples_per_class": None if LOSSES[loss].get("loss") != "triplet" else 4}
    values = {
        "name": "run", "runs_dir": str(runs), "epochs": 2, "global_batch_size": 20 if loss.endswith("hard") else 22,
        "precision": "float64", "model": {"width": 8, "stem": "imagenet", "norm": "sync"}, **LOSSES[loss],
    }  # fmt: skip
    cached = {"cache_dir": str(Path(shards).parent / "cache")}
    values["data"] = {
        "shards": str(shards),
        **cached,
        "val_fraction": val_fraction,
        **batch,
        **LOSSES[loss].get("data", {}),
    }
    return Q1(**{**values, **changes})


def train(loss, shards, runs):
    """Train on this rank's share; the final state and the rows of metrics."""
    settings = settings_of(loss, shards, runs)
    fit(settings)
    checkpoint = torch.load(sorted(Path(runs).glob("run/checkpoints/*.pt"))[-1], weights_only=True)
    rows = [json.loads(line) for line in (Path(runs) / "run/metrics.jsonl").read_text().splitlines()]
    return checkpoint, rows


def one_step(loss, shards, ids, precision="float64"):
    """The state after one step on a global batch, and this rank's averaged gradients."""
    manifest = read_manifest(shards)
    model = {
        "width": 8,
        "stem": "cifar",
        "norm": "sync",
    }  # leaves batch norm 16 values in the last stage: well-conditioned
    settings = settings_of(loss, shards, "unused", model=model, precision=precision)
    learner = Learner(settings, Inputs(10, manifest.mean, manifest.std), 10, torch.device("cpu"))
    part = learner.blocks.share(len(ids))
    (batch,) = read_ahead(Split(shards, manifest, "train"), [(ids, part)], torch.device("cpu"), 1, 1)
    value = learner.step([batch], epoch=0, step=5)
    gradients = {name: p.grad for name, p in learner.model.named_parameters()}
    assert None not in gradients.values()  # the head too, which a triplet loss does not touch
    return {"value": value, "gradients": gradients, **with_total_sums(learner.state_dict())}


def micro_step(loss, shards, ids, size, norms_are_fixed=False):
    """One step on a global batch in micro-batches: what it leaves, as `one_step` gives it."""
    manifest = read_manifest(shards)
    settings = settings_of(loss, shards, "unused", model={"width": 8, "stem": "cifar", "norm": "sync"})
    learner = Learner(settings, Inputs(10, manifest.mean, manifest.std), 10, torch.device("cpu"))
    if norms_are_fixed:
        for module in learner.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval().train = lambda mode=True, module=module: module
    parts = [(part, learner.blocks.share(len(part))) for part in blocks(ids, size)]
    batches = list(read_ahead(Split(shards, manifest, "train"), parts, torch.device("cpu"), 1, len(parts)))
    assert len(batches) == -(-len(ids) // size)
    value = learner.step(batches, epoch=0, step=5)
    gradients = {name: p.grad for name, p in learner.model.named_parameters()}
    return tensors({"value": value, "gradients": gradients, **with_total_sums(learner.state_dict())})


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_add_up_to_the_step_on_the_whole_batch(loss, shapes_shards):
    """With norms that do not look at the batch: what is left is the loss, its triplets and the centres."""
    ids = np.array([*range(14), 3, 3])
    whole = micro_step(loss, shapes_shards, ids, len(ids), norms_are_fixed=True)
    for size in (7, 1):
        for path, ours in micro_step(loss, shapes_shards, ids, size, norms_are_fixed=True).items():
            assert distance(ours, whole[path]) <= 1e-11, (size, path)


@pytest.mark.parametrize(("loss", "ranks"), [("center", 2), ("semi-hard", 3)])
def test_micro_batches_are_cut_before_ranks_are(loss, ranks, shapes_shards):
    """The last micro-batch holds one sample: other ranks have an empty part of it."""
    ids = np.arange(22)
    expected = micro_step(loss, shapes_shards, ids, 7)
    for result in on_ranks(micro_step, ranks, loss, shapes_shards, ids, 7):
        for path, value in expected.items():
            assert distance(result[path], value) <= 1e-12, path


def batches(labels):
    """Global batches with something odd in each."""
    one_class = np.flatnonzero(labels == 3)
    return {
        "mixed": np.arange(22),
        "fewer samples than ranks": np.array([1, 2, 9]),
        "one class only": one_class[:9],
        "duplicates": np.array([5, 5, 5, 9, 9, 30, 31, 32, 5, 9]),
        "one class, then others: ranks without a triplet": np.concatenate([one_class[:5], [*range(11)]]),
    }


CASES = list(product((2, 3, 4), LOSSES, batches(np.arange(10))))
FEW = covering((2, 3, 4), list(LOSSES), list(batches(np.arange(10))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "cases"), [(4, FEW), (2, FEW), (3, CASES)], ids=["4", "2", "3, all"]
)  # fmt: skip
def test_one_step_on_any_number_of_ranks_is_that_of_one_process(ranks, cases, shapes_shards):
    """Few: each loss on each batch, each on each number of ranks."""
    cases = [case[1:] for case in cases if case[0] == ranks]
    results = on_ranks(steps, ranks, cases, shapes_shards)
    for case in cases:
        for path, value in steps([case], shapes_shards)[case].items():
            assert distance(results[0][case][path], value) <= 1e-12, (case, path)
        for other in results[1:]:
            for path, value in results[0][case].items():
                assert torch.equal(other[case][path].nan_to_num(), value.nan_to_num()), (case, path)


@pytest.mark.parametrize("loss", ["center", "semi-hard"])
def test_float32_on_ranks_rounds_no_more_than_one_process_does(loss, shapes_shards):
    """A ReLU near 0 turns rounding into a jump: one process itself is some 1e-2 from the exact gradient here."""

    def error(step):
        return max(distance(tensors(step["gradients"])[path], value) for path, value in exact.items())

    ids = np.arange(22)
    exact = tensors(one_step(loss, shapes_shards, ids)["gradients"])
    one = one_step(loss, shapes_shards, ids, "float32")
    three = on_ranks(one_step, 3, loss, shapes_shards, ids, "float32")[0]
    assert error(three) <= 2 * error(one)
    assert distance(three["value"], one["value"]) <= 1e-5


def steps(cases, shards):
    """{(loss, batch): what one step of it leaves}."""
    odd = batches(Split(shards, read_manifest(shards), "train").labels)
    return {(loss, batch): tensors(one_step(loss, shards, odd[batch])) for loss, batch in cases}


@pytest.fixture(scope="module")
def alone(shapes_shards, tmp_path_factory):
    """Of a loss: the final state and the rows of metrics of one process."""
    return cache(lambda loss: train(loss, shapes_shards, tmp_path_factory.mktemp(loss)))


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "ranks"), [("center", 4), ("ce", 2), ("batch-hard", 3), ("all", 4)])
def test_twenty_steps_on_any_number_of_ranks_are_those_of_one_process(loss, ranks, alone, shapes_shards, tmp_path):
    expected, expected_rows = alone(loss)
    assert expected["step"] >= 18
    checkpoint, rows = on_ranks(train, ranks, loss, shapes_shards, tmp_path)[0]
    ours, theirs = tensors(with_total_sums(checkpoint)), tensors(with_total_sums(expected))
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        assert distance(ours[path], value) <= 1e-6, path
    for row, expected_row in zip(rows, expected_rows, strict=True):
        same = {k: v for k, v in expected_row.items() if not k.endswith("_s")}
        assert [k for k in row if not k.endswith("_s")] == list(same)
        assert {k: row[k] for k in same} == nearly(same)


def evaluated(shards, precision):
    """Figures of a model with fixed weights, in blocks of 8: several for each rank, and none for some."""
    manifest = read_manifest(shards)
    settings = settings_of("center", shards, "unused", precision=precision)
    learner = Learner(settings, Inputs(10, manifest.mean, manifest.std), 10, torch.device("cpu"))
    learner.class_means = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)).to(learner.dtype)
    split = Split(shards, manifest, "test")
    with mock.patch.object(evaluation, "BLOCK", 8):
        return [evaluation.evaluate(learner, split, np.arange(n)) for n in (len(split), 13)]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_evaluation_of_equal_weights_gives_equal_figures_on_any_number_of_ranks(precision, shapes_shards):
    (expected,) = on_ranks(evaluated, 1, shapes_shards, precision)
    for ranks in (2, 3, 4):
        assert on_ranks(evaluated, ranks, shapes_shards, precision) == [expected] * ranks


def trained(shards, runs, forgotten, kind):
    """Train to the end, forgetting what came after a checkpoint; the last checkpoint."""
    folder = Path(runs) / "run/checkpoints"
    if forgotten and rank() == 0:
        for path in folder.iterdir():
            if path.name > f"step-{forgotten:09d}.pt":
                path.unlink()
    torch.distributed.barrier()
    fit(resumable(kind, shards, runs))
    torch.distributed.barrier()
    return torch.load(max(folder.iterdir()), weights_only=True)


def resumable(kind, shards, runs):
    """Two epochs of about five steps, each with a checkpoint."""
    changes = {
        "val_fraction": 0.5,
        "precision": "float32",
        "checkpoint_every": 1,
        "keep_checkpoints": 99,
        **RESUMED[kind],
    }
    return settings_of(kind, shards, runs, **changes)


RESUMED = {"ce": {"model": {"norm": "local", "width": 8}}, "batch-hard": {"ema_decay": 0.9}, "center": {}}
"""What else is asked of a loss; two with micro-batches, two with orders of their own."""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ranks", "stops"), [("ce", 3, (0,)), ("batch-hard", 4, (0, 1))])
def test_a_resume_at_any_step_on_as_many_ranks_changes_no_bit(kind, ranks, stops, shapes_shards, tmp_path):
    whole = on_ranks(trained, ranks, shapes_shards, tmp_path, 0, kind)[0]
    steps = random.Random(f"{kind} {ranks}").sample(range(1, whole["step"]), 2)
    for stopped_at in (steps[i] for i in stops):
        resumed = on_ranks(trained, ranks, shapes_shards, tmp_path, stopped_at, kind)
        assert same_state(resumed[0], whole), f"stopped at {stopped_at}"


def lagging(shards, runs):
    """Go on from checkpoints of which rank 1 sees none; the last checkpoint, the step gone on from."""
    started = []
    run = _Fit(prepare("q1", resumable("ce", shards, runs)), torch.device("cpu"), [started.append])
    if rank() == 1:
        run.folder.checkpoints.steps = list
    run.run()
    torch.distributed.barrier()
    checkpoint = torch.load(max((Path(runs) / "run/checkpoints").iterdir()), weights_only=True)
    return checkpoint, [event.first_step for event in started if isinstance(event, Started)]


@pytest.mark.slow
def test_all_ranks_go_on_from_the_checkpoint_that_the_first_one_sees(shapes_shards, tmp_path):
    whole = on_ranks(trained, 2, shapes_shards, tmp_path, 0, "ce")[0]
    for path in (tmp_path / "run/checkpoints").iterdir():
        if path.name > "step-000000008.pt":
            path.unlink()
    resumed, first = on_ranks(lagging, 2, shapes_shards, tmp_path)[0]
    assert first == [8]
    assert same_state(resumed, whole)


@pytest.fixture(scope="module")
def whole_on_two_ranks(shapes_shards, tmp_path_factory):
    """Folder of a run on two ranks; what it ended with."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, on_ranks(resumed_in_float64, 2, shapes_shards, folder)[0]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_resume_in_the_middle_of_an_epoch_on_another_number_of_ranks_computes_the_same(
    ranks, whole_on_two_ranks, shapes_shards, tmp_path
):
    runs, whole = whole_on_two_ranks
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "run/checkpoints"
    max(folder.iterdir()).unlink()
    left = torch.load(max(folder.iterdir()), weights_only=True)
    assert left["step"] < whole["step"], "nothing is left to do"
    assert len(left["sums"]["counts"]) == 2
    moved = on_ranks(resumed_in_float64, ranks, shapes_shards, tmp_path)[0]
    ours, theirs = tensors(with_total_sums(moved)), tensors(with_total_sums(whole))
    for path, value in theirs.items():
        assert distance(ours[path], value) <= 1e-6, path
    rows = [
        [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
        for place in (tmp_path, runs)
    ]
    for ours_row, theirs_row in zip(*rows, strict=True):
        same = {k: v for k, v in theirs_row.items() if not k.endswith("_s")}
        assert {k: ours_row[k] for k in same} == nearly(same)


def resumed_in_float64(shards, runs):
    fit(settings_of("center", shards, runs, checkpoint_every=3))
    torch.distributed.barrier()
    return torch.load(max((Path(runs) / "run/checkpoints").iterdir()), weights_only=True)


def taken_apart(shards, runs):
    """What a run says whose group is gone at its fourth step, as Ray takes apart that of a lost worker's others."""
    asked = []

    def stop():
        asked.append(None)
        if len(asked) == 4:
            torch.distributed.destroy_process_group()
        return False

    settings = settings_of("center", shards, runs, checkpoint_every=1)
    try:
        fit(settings, stop=stop)
    except Exception as error:
        return str(error)


def test_a_worker_whose_group_is_taken_apart_writes_nothing_more(shapes_shards, tmp_path):
    said = run_ranks(taken_apart, 2, shapes_shards, tmp_path)
    assert said == ["the group of workers was taken apart"] * 2
    assert max((tmp_path / "run/checkpoints").iterdir()).name <= "step-000000002.pt"  # whose writing nobody waited for


def diverging(shards, runs):
    """A run in which rank 1's memory flips one bit of a weight, after the first epoch."""
    settings = settings_of("center", shards, runs, val_fraction=0.5, precision="float32")
    run = _Fit(prepare("q1", settings), torch.device("cpu"), [])
    save = run._save

    def save_then_flip(step):
        save(step)
        run.folder.checkpoints.wait()
        if rank() == 1:
            run.learner.model.fc.bias.data.view(torch.int32)[2] ^= 1 << 20

    run._save = save_then_flip
    try:
        run.run()
    except RunError as error:
        return str(error)
    return None


def test_a_rank_that_diverges_stops_the_run_and_is_named(shapes_shards, tmp_path):
    settings = settings_of("center", shapes_shards, tmp_path, val_fraction=0.5)
    RunFolder(tmp_path / "run").create("q1", prepare("q1", settings))
    messages = on_ranks(diverging, 3, shapes_shards, tmp_path)
    assert len(set(messages)) == 1
    assert "rank 1 (on " in messages[0]
    assert "differs from the other ranks, first in " in messages[0]
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert len(saved) == 1, "what diverged was saved"
