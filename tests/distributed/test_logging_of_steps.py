"""Figures of steps on several ranks: those of one process, and no bit of the run is another for them."""

import json
from pathlib import Path

import torch
from kept_ranks import on_ranks
from states import same_state, tensors

from dlops_dist.distributed.collectives import rank
from dlops_dist.engine import fit
from dlops_dist.recipes.q1 import Settings as Q1

LOSSES = {
    "triplet, micro-batches": {
        "loss": "triplet", "triplet": {"mining": "all", "margin": 0.05}, "micro_batch_size": 10,
        "optimizer": {"lr": 0.002},
    },
    "center, clipped": {"loss": "center", "optimizer": {"lr": 0.02, "clip_norm": 0.5}},
}  # fmt: skip


def train(loss, every, shards, runs):
    """The last checkpoint and the rows of steps, on rank 0."""
    settings = Q1(
        name="run", runs_dir=str(runs), epochs=1, global_batch_size=20, blocks=2, log_every=every, wandb="off",
        data={"shards": str(shards), "reader": "decode"}, model={"width": 8, "stem": "imagenet"}, **LOSSES[loss],
    )  # fmt: skip
    fit(settings)
    if rank():
        return None
    checkpoint = torch.load(max((Path(runs) / "run/checkpoints").iterdir()), weights_only=True)
    lines = (Path(runs) / "run/steps.jsonl").read_text().splitlines() if every else []
    differs = ("memory_gb", "images_per_s")
    return tensors(checkpoint), [{k: v for k, v in json.loads(line).items() if k not in differs} for line in lines]


def train_all(every, shards, runs):
    return {loss: train(loss, every, shards, runs / loss) for loss in LOSSES}


def test_ranks_log_what_one_process_logs_and_change_no_bit_by_it(shapes_shards, tmp_path):
    one = train_all(3, shapes_shards, tmp_path / "one")
    silent = train_all(0, shapes_shards, tmp_path / "silent")
    logged, _ = on_ranks(train_all, 2, 3, shapes_shards, tmp_path / "logged")
    for loss in LOSSES:
        state, rows = logged[loss]
        assert same_state(state, silent[loss][0]), loss
        assert [row["step"] for row in rows] == [3, 6, 9, 12]
        assert rows == one[loss][1]
    assert {"loss", "lr", "gradient_norm", "active_triplets"} < logged["triplet, micro-batches"][1][0].keys()
    assert any(0 < row["active_triplets"] < 1 for row in logged["triplet, micro-batches"][1])
    assert logged["center, clipped"][1][-1]["center_spread"] > 0
