"""A user's recipe, with a model, a loss and weights of a loss from elsewhere: one process against 2, 3 and 4 ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from kept_ranks import on_ranks
from states import same_state, tensors, with_total_sums

from dlops_dist.config import load_recipe
from dlops_dist.data.loader import read_ahead
from dlops_dist.data.order import blocks
from dlops_dist.data.shards import Split, read_manifest
from dlops_dist.distributed.collectives import rank, world_size
from dlops_dist.engine import fit
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.samples import Inputs

EXAMPLES = Path(__file__).parents[2] / "examples"
EVERYTHING = Path(__file__).parents[1] / "everything.py"
EXAMPLE = str(EXAMPLES / "proxy_anchor_pml.py")
CPU = torch.device("cpu")


def settings_of(shards, runs="unused", example=EXAMPLE, **changes):
    values = {
        "name": "run", "runs_dir": str(runs), "epochs": 1, "global_batch_size": 22, "blocks": 4, "precision": "float64",
        "data": {"shards": str(shards), "reader": "decode", "val_fraction": 0.5}, "optimizer": {"lr": 0.01},
    }  # fmt: skip
    return load_recipe(example).settings_type(**{**values, **changes})


def one_step(example, shards, ids, size):
    """What a step on a global batch leaves, in micro-batches of a size."""
    manifest = read_manifest(shards)
    inputs = Inputs(10, manifest.mean, manifest.std, (32, 32))
    learner = Learner(settings_of(shards, example=example, **SMALL.get(Path(example).stem, {})), inputs, 10, CPU)
    parts = [(part, learner.blocks.share(len(part))) for part in blocks(ids, size)]
    batches = list(read_ahead(Split(shards, manifest, "train"), parts, CPU, 1, len(parts), learner.reads_next))
    value = learner.step(batches, epoch=1, step=5)
    gradients = {name: p.grad for name, p in [*learner.model.named_parameters(), *learner.loss.named_parameters()]}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    return tensors({"value": value, "gradients": gradients, **with_total_sums(learner.state_dict())})


SMALL = {
    "vit_timm": {"width": 32, "depth": 2},
    "everything": {"epochs": 2, "augment": {"mixup": 0.2, "cutmix": 1.0}, "ema_decay": 0.9},
}
STEPS = [("vit_timm", 2, 22), ("mixup", 3, 11)]
MORE = [("arcface", 2, 11), ("supcon", 4, 11), ("vit_timm", 3, 8), ("open_set_retrieval", 4, 22)]
"""`verify` takes a step of every example in one piece, by `test_each_example_is_exact`."""


@pytest.mark.parametrize(
    ("example", "ranks", "size"), [*STEPS, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_one_step_on_any_number_of_ranks_is_that_of_one_process(example, ranks, size, shapes_shards):
    """In micro-batches of a size, where it is less than the batch."""
    arguments = str(EXAMPLES / f"{example}.py"), shapes_shards, np.arange(22), size
    expected = one_step(*arguments)
    results = on_ranks(one_step, ranks, *arguments)
    for path, value in expected.items():
        assert all(torch.equal(result[path].nan_to_num(), value.nan_to_num()) for result in results), path


def trained(example, shards, runs, forgotten):
    """Train to the end, forgetting what came after a checkpoint; the last checkpoint."""
    folder = Path(runs) / "run/checkpoints"
    if forgotten and rank() == 0:
        for path in folder.iterdir():
            if path.name > f"step-{forgotten:09d}.pt":
                path.unlink()
    if world_size() > 1:
        torch.distributed.barrier()
    changes = SMALL.get(Path(example).stem, {})
    fit(settings_of(shards, runs, example, checkpoint_every=1, keep_checkpoints=99, **changes), task=example)
    if world_size() > 1:
        torch.distributed.barrier()
    return torch.load(max(folder.iterdir()), weights_only=True)


def rows_of_resumed_runs(example, shards, folder):
    """Of a run in one process, to whose bits a resume comes, and two ranks."""
    arguments, runs = (str(example), shards), {1: folder / "one", 2: folder / "two"}
    whole = {1: trained(*arguments, runs[1], 0), 2: on_ranks(trained, 2, *arguments, runs[2], 0)[0]}
    assert whole[1]["step"] > 2
    assert same_state(trained(*arguments, runs[1], 2), whole[1])
    assert same_state(on_ranks(trained, 2, *arguments, runs[2], 2)[0], whole[2])
    assert same_state(whole[2], whole[1])
    return [json.loads(line) for line in whole[1]["rows"].splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("example", ["vit_timm", "adamw_randaugment"])
def test_a_resume_changes_no_bit_and_ranks_train_as_one_process(example, shapes_shards, tmp_path):
    rows_of_resumed_runs(EXAMPLES / f"{example}.py", shapes_shards, tmp_path)


def test_a_recipe_with_everything_at_once_resumes_and_trains_on_ranks(shapes_shards, tmp_path):
    rows = rows_of_resumed_runs(EVERYTHING, shapes_shards, tmp_path)
    assert [row["step"] for row in rows] == [5, 10]
    assert all(0.1 <= row["test/certainty"] <= 1 for row in rows)
