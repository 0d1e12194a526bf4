"""The same bits on any number of ranks: whole runs, whose checkpoints and rows are compared byte for byte."""

import io
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from kept_ranks import on_ranks

from dlops_dist.config import load_recipe
from dlops_dist.data.loader import Batch
from dlops_dist.distributed.collectives import rank, world_size
from dlops_dist.engine import epoch_sums, fit, gradients
from dlops_dist.engine.exactness import default_blocks
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.samples import Inputs
from dlops_dist.errors import RunError, UserError

EXAMPLES = Path(__file__).parents[2] / "examples"
CHANGES = {"resized_crop": 0.4, "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "cutout": 8}
TRIPLET = {"loss": "triplet", "optimizer": {"lr": 0.002}, "global_batch_size": 24}
RUNS = {
    "ce": {
        "ce": {"label_smoothing": 0.1}, "optimizer": {"lr": 0.02, "clip_norm": 1.0}, "ema_decay": 0.9,
        "flip_test": True, "augment": {"mixup": 0.2, "cutmix": 1.0},
    },
    "ce, bf16": {"precision": "bf16", "augment": CHANGES},
    "batch-hard": {**TRIPLET, "triplet": {"ce_weight": 0.5}},
    "batch-hard, micro-batches": {**TRIPLET, "micro_batch_size": 12},
    "semi-hard": {**TRIPLET, "triplet": {"mining": "semi-hard", "average": "active"}},
    "all": {**TRIPLET, "triplet": {"mining": "all"}, "data": {"order": "uniform"}, "blocks": 6},
    "center": {
        "loss": "center", "micro_batch_size": 12, "data": {"drop_last": False}, "model": {"width": 8, "stem": "cifar"},
    },
    "center, more classes than samples": {"loss": "center", "global_batch_size": 9, "augment": {"flip": False}},
}  # fmt: skip
"""Two epochs; blocks of unequal sizes."""


def settings_of(run, shards, runs, task="q1", **more):
    changes = {**RUNS[run], **more} if task == "q1" else more
    values = {
        "name": "run", "runs_dir": str(runs), "epochs": 2, "global_batch_size": 23, "blocks": 4,
        "exactness": "bits", "checkpoint_every": 3, "keep_checkpoints": 99,
        **({"model": {"width": 8, "stem": "imagenet"}} if task == "q1" else {}), **changes,
        "data": {"shards": str(shards), "val_fraction": 0.5, "reader": "decode", **changes.get("data", {})},
    }  # fmt: skip
    return load_recipe(task).settings_type(**values)


def trained(run, shards, runs, after=None, **more):
    """Train to the end from a checkpoint, forgetting later ones; every file of results that the run then has."""
    folder = Path(runs) / "run/checkpoints"
    if after is not None and rank() == 0:
        for path in folder.iterdir():
            if path.name > f"step-{after:09d}.pt":
                path.unlink()
    if world_size() > 1:
        torch.distributed.barrier()
    fit(settings_of(run, shards, runs, **more), task=more.get("task", "q1"))
    if world_size() > 1:
        torch.distributed.barrier()
    rows = [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    return found | {"rows": [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows]}


STAGED = {
    "batch norms, of which the classifier leaves one out": {
        "finetune": True, "model": {"norm": "batch", "dropout": 0.3}, "pretrain": {"corruption": "masking"},
    },
    "codes that begin nowhere in particular, by which a product may be rounded": {},
}  # fmt: skip


def trained_in_stages(kind, shards, runs):
    changes = STAGED[kind]
    settings = load_recipe("q2").settings_type(
        name="run", runs_dir=str(runs), epochs=2, global_batch_size=22, blocks=4, exactness="bits",
        data={"shards": str(shards), "reader": "decode"}, optimizer={"lr": 0.02}, keep_checkpoints=99,
        finetune=changes.get("finetune", False),
        model={"layers": (12, 9, 5), "code_layer": 9, **changes.get("model", {})},
        pretrain={"epochs": 4, "joint_epochs": 1, "optimizer": {"lr": 0.4}, **changes.get("pretrain", {})},
    )  # fmt: skip
    fit(settings, task="q2")
    if world_size() > 1:
        torch.distributed.barrier()
    return {path.name: path.read_bytes() for path in (Path(runs) / "run/checkpoints").iterdir()}


NORMS, CODES = STAGED


@pytest.mark.parametrize("kind", [pytest.param(NORMS, marks=pytest.mark.slow), CODES])
def test_every_stage_of_autoencoders_on_three_ranks_leaves_the_bytes_of_one_process(kind, stl_shards, tmp_path):
    expected = trained_in_stages(kind, stl_shards, tmp_path / "one")
    assert len(expected) == 3 * 4 + 1 + 2
    found = on_ranks(trained_in_stages, 3, kind, stl_shards, tmp_path / "ranks")[0]
    assert sorted(name for name in expected if found[name] != expected[name]) == []


FEW = [("ce", 3), ("batch-hard", 4), ("center", 2)]
MORE = [(run, 2 + place % 3) for place, run in enumerate(RUNS) if (run, 2 + place % 3) not in FEW]


@pytest.mark.parametrize(("run", "ranks"), [*FEW, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)])
def test_a_run_on_any_number_of_ranks_leaves_the_bytes_of_one_process(run, ranks, shapes_shards, tmp_path):
    expected = trained(run, shapes_shards, tmp_path / "one")
    assert len(expected) > 4
    for found in on_ranks(trained, ranks, run, shapes_shards, tmp_path / "ranks"):
        assert found["rows"] == expected["rows"]
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []


def trained_with_sums_kept_once(*arguments, **changes):
    with mock.patch.object(epoch_sums, "LARGEST", 0):
        return trained(*arguments, **changes)


@pytest.mark.parametrize(
    ("run", "ranks"), [("center", 3), pytest.param("batch-hard, micro-batches", 2, marks=pytest.mark.slow)]
)
def test_sums_of_classes_that_are_kept_once_are_those_of_the_blocks(run, ranks, shapes_shards, tmp_path):
    """The same bytes on any number of ranks; within rounding those of sums of each of four blocks."""
    expected = trained_with_sums_kept_once(run, shapes_shards, tmp_path / "one")
    ours, by_block = (
        [torch.load(io.BytesIO(files[name]), weights_only=True) for name in sorted(files.keys() - {"rows"})]
        for files in (expected, trained(run, shapes_shards, tmp_path / "blocks"))
    )
    for own, other in zip(ours, by_block, strict=True):
        once, each = own["sums"].pop("by_class"), other["sums"].pop("by_class")
        assert (len(once), len(each)) == (1, 4)
        torch.testing.assert_close(once[0], each.sum(dim=0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own["class_means"], other["class_means"], rtol=1e-5, atol=1e-5, equal_nan=True)
        assert all(torch.equal(own["model"][name], value) for name, value in other["model"].items())
    for found in on_ranks(trained_with_sums_kept_once, ranks, run, shapes_shards, tmp_path / "ranks"):
        assert [name for name in expected if found[name] != expected[name]] == []
    again = trained_with_sums_kept_once(run, shapes_shards, tmp_path / "one", after=3)
    assert [name for name in expected if again[name] != expected[name]] == []


def trained_in_small_buckets(*arguments):
    """What `trained` finds; whether each exchange began before the backward pass had ended; how many flat tensors a
    bucket ever laid out.
    """
    passing, early, layouts = [False], [], []

    def passes(*given):
        passing[0] = True
        found = gradients_of(*given)
        passing[0] = False
        return found

    def begins(bucket):
        early.append(passing[0])
        layouts.append(len(bucket._views))
        start(bucket)

    start, gradients_of = gradients._Bucket.start, gradients.gradients_of
    with (
        mock.patch.object(gradients, "BUCKET", 4096), mock.patch.object(gradients, "gradients_of", passes),
        mock.patch.object(gradients._Bucket, "start", begins),
    ):  # fmt: skip
        return trained(*arguments), early, max(layouts)


def test_gradients_are_exchanged_while_the_backward_pass_goes_on_to_the_same_bits(shapes_shards, tmp_path):
    expected = trained("ce", shapes_shards, tmp_path / "one")
    for found, early, layouts in on_ranks(trained_in_small_buckets, 2, "ce", shapes_shards, tmp_path / "ranks"):
        assert found == expected
        assert layouts <= 2, "those of two blocks serve for all steps"
        buckets = len(early) // expected["rows"][-1]["step"] // 2  # each is begun once more, for what has not been
        assert buckets > 10
        assert all(early[:buckets])


def test_a_run_that_shrinks_and_grows_in_the_middle_of_an_epoch_does_too(shapes_shards, tmp_path):
    expected = trained("batch-hard", shapes_shards, tmp_path / "one")
    moved = tmp_path / "moved"
    on_ranks(trained, 4, "batch-hard", shapes_shards, moved)
    trained("batch-hard", shapes_shards, moved, after=3)
    assert on_ranks(trained, 3, "batch-hard", shapes_shards, moved, 6)[0] == expected


@pytest.mark.parametrize(
    "task",
    ["q1", str(EXAMPLES / "vit_timm.py"), pytest.param(str(EXAMPLES / "adamw_randaugment.py"), marks=pytest.mark.slow)],
)
def test_a_worker_with_more_cores_computes_several_blocks_at_once_to_the_same_bits(
    task, shapes_shards, tmp_path, monkeypatch
):
    """Transforms that set one random state for all threads, dropouts that each pass hands its numbers, too."""
    small = {"width": 32, "depth": 2} if "vit" in task else {}
    threads = torch.get_num_threads()
    expected = trained("ce", shapes_shards, tmp_path / "one core", task=task, **small)
    monkeypatch.setattr("dlops_dist.engine.exactness.threads_at_start", lambda: 3)
    assert trained("ce", shapes_shards, tmp_path / "three cores", task=task, **small) == expected
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("batch_size", "blocks"), [(1, 1), (63, 1), (64, 2), (127, 2), (128, 4), (255, 4), (256, 8), (4096, 8)]
)
def test_by_default_blocks_have_32_samples_or_more(batch_size, blocks):
    assert default_blocks(batch_size) == blocks


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"blocks": 24}, "blocks: 24 are more than the 23 samples of a batch"),
        (
            {"model": {"width": 8, "norm": "sync"}},
            "exactness: bits cannot be had: .*bn1 is a batch norm over all workers' samples",
        ),
        (
            {"model": {"width": 8, "norm": "local"}},
            "exactness: bits cannot be had: .*bn1 .* results depend on --workers",
        ),
        ({"deterministic": False}, "exactness: bits cannot be had: --no-deterministic"),
        ({"blocks": 22}, "batch norm sees one value in each of 64 channels"),
    ],
)
def test_what_cannot_be_had_is_refused(changes, said, shapes_shards, tmp_path):
    with pytest.raises((UserError, RunError), match=said):
        trained("ce", shapes_shards, tmp_path, **changes)


def test_more_ranks_than_blocks_are_refused(shapes_shards, tmp_path):
    (said, _) = on_ranks(refused, 2, shapes_shards, tmp_path)
    assert said == (
        "workers: 2 are more than the 1 block of a batch of 23; start at most 1, or pass --blocks 2, with other bits, "
        "or --exactness rounding"
    )


def refused(shards, runs):
    with pytest.raises(UserError) as error:
        trained("ce", shards, runs, blocks=1)
    return str(error.value)


def refused_in_stages(shards, runs):
    settings = load_recipe("q2").settings_type(
        name="run", runs_dir=str(runs), global_batch_size=22, data={"shards": str(shards), "reader": "decode"},
        model={"layers": (12, 9), "code_layer": 9},
    )  # fmt: skip
    with pytest.raises(UserError, match="workers: 2 are more than the 1 block of a batch of 22; start at most 1"):
        fit(settings, task="q2")
    return list(Path(runs).glob("run/checkpoints/*"))


def test_they_are_refused_before_the_first_stage_not_before_the_one_with_norms(stl_shards, tmp_path):
    assert on_ranks(refused_in_stages, 2, stl_shards, tmp_path) == [[], []]


def after_a_single_sample():
    """Of a learner whose first step finds a block without any: the end of an epoch, gone on from there."""
    settings = load_recipe("q1").settings_type(global_batch_size=2, blocks=2, model={"width": 8, "stem": "cifar"})
    learner = Learner(settings, Inputs(4, (0.5,) * 3, (0.25,) * 3), 10, torch.device("cpu"))
    images = torch.full((1, 32, 32, 3), 100, dtype=torch.uint8)
    images[:, :16] = 200
    ids, part = torch.arange(1), learner.blocks.share(1)
    learner.step([Batch(images[part], ids[part], torch.ones(1).long(), part, np.ones(1, np.int64))], 0, 0)
    return {name: value.clone() for name, value in learner.model.state_dict().items()}


def test_a_rank_whose_block_is_empty_moves_the_norms_as_others_do():
    (expected,) = on_ranks(after_a_single_sample, 1)
    assert expected["bn1.num_batches_tracked"] == 1
    for found in on_ranks(after_a_single_sample, 2):
        assert all(torch.equal(found[name], value) for name, value in expected.items())
