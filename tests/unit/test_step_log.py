"""Figures of steps: what a row holds, that it costs no bit, and what a stop in between leaves."""

import json
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from states import same_checkpoint

from dlops_dist.data.loader import read_ahead
from dlops_dist.data.shards import Split, read_manifest
from dlops_dist.engine import fit
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.run_folder import STEPS, RunFolder
from dlops_dist.engine.samples import Inputs
from dlops_dist.engine.step_log import StepLog, memory
from dlops_dist.events import Logged
from dlops_dist.losses import CenterLoss, TripletLoss
from dlops_dist.recipes.q1 import Settings as Q1
from dlops_dist.recipes.q2 import Settings as Q2

CPU = torch.device("cpu")
DIFFERS = {"memory_gb", "images_per_s"}


def settings_of(shards, runs, **changes):
    values = {
        "name": "run", "runs_dir": str(runs), "epochs": 2, "global_batch_size": 20, "log_every": 5, "wandb": "off",
        "data": {"shards": str(shards), "reader": "decode"}, "model": {"width": 8, "stem": "imagenet"},
        "optimizer": {"lr": 0.02},
    }  # fmt: skip
    return Q1(**{**values, **changes})


def rows(runs):
    return [json.loads(line) for line in (Path(runs) / "run" / STEPS).read_text().splitlines()]


def lasting(runs):
    """The rows, without what the machine has to do with."""
    return [{name: value for name, value in row.items() if name not in DIFFERS} for row in rows(runs)]


def stopped_after(number):
    """Asked before each epoch, and after each step: whether to stop, from that often on."""
    asked = iter(range(10**6))
    return lambda: next(asked) >= number


def test_rows_come_every_so_many_steps_and_hold_what_the_step_was(shapes_shards, tmp_path):
    events = []
    fit(settings_of(shapes_shards, tmp_path), listeners=[events.append])
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == [5, 10, 15, 20]
    assert [row["epoch"] for row in logged] == [1, 1, 2, 2]
    assert [event.row for event in events if isinstance(event, Logged)] == logged
    for row in logged:
        assert row.keys() == {"epoch", "step", "lr", "loss", "gradient_norm"} | DIFFERS
        assert row["gradient_norm"] > 0
        assert 0.05 < row["memory_gb"] < 100
        assert row["images_per_s"] > 0
    epoch = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert logged[1]["loss"] == pytest.approx(epoch["train/loss"], rel=0.5)


def test_never_leaves_no_file(shapes_shards, tmp_path):
    fit(settings_of(shapes_shards, tmp_path, log_every=0, epochs=1))
    assert not (tmp_path / "run" / STEPS).exists()


LOSSES = {
    "ce": {"optimizer": {"lr": 0.02, "clip_norm": 0.5}},
    "triplet": {"loss": "triplet"},
    "triplet, micro-batches": {"loss": "triplet", "micro_batch_size": 10},
    "center": {"loss": "center"},
}


@pytest.mark.parametrize("loss", LOSSES)
def test_whether_steps_are_logged_changes_no_bit(loss, shapes_shards, tmp_path):
    for runs, every in (("never", 0), ("always", 1)):
        fit(settings_of(shapes_shards, tmp_path / runs, log_every=every, epochs=1, **LOSSES[loss]))
    last = [max((tmp_path / runs / "run/checkpoints").iterdir()) for runs in ("never", "always")]
    assert same_checkpoint(*last)
    for row in rows(tmp_path / "always"):
        assert ("active_triplets" in row) == ("triplet" in loss)
        assert ("center_spread" in row) == (loss == "center")
        assert 0 <= row.get("active_triplets", 0) <= 1


@pytest.mark.parametrize("stop", [6, 12, 17])
def test_a_run_that_was_stopped_has_the_rows_of_one_that_was_not(stop, shapes_shards, tmp_path):
    fit(settings_of(shapes_shards, tmp_path / "whole", log_every=2))
    parts = settings_of(shapes_shards, tmp_path / "parts", log_every=2)
    with pytest.raises(KeyboardInterrupt):
        fit(parts, stop=stopped_after(stop))
    with (tmp_path / "parts/run" / STEPS).open("a") as file:  # a killed run went on past its checkpoint
        last = rows(tmp_path / "parts")[-1]
        file.write(json.dumps(last | {"step": last["step"] + 2}) + "\n" + json.dumps(last)[:9])
    fit(parts)
    assert lasting(tmp_path / "parts") == lasting(tmp_path / "whole")


def test_a_run_without_a_checkpoint_begins_its_rows_anew(tmp_path):
    folder = RunFolder(tmp_path)
    folder.add_steps([{"step": 2}, {"step": 4}])
    folder._keep_steps(3)
    folder.add_steps([{"step": 4, "loss": 1.0}])
    assert [json.loads(line) for line in (tmp_path / STEPS).read_text().splitlines()] == [
        {"step": 2}, {"step": 4, "loss": 1.0},
    ]  # fmt: skip
    folder._keep_steps(0)
    assert (tmp_path / STEPS).read_text() == ""


@pytest.mark.parametrize("clip", [None, 0.01])
def test_the_gradients_norm_is_that_of_all_of_it_before_clipping(clip, shapes_shards):
    settings = settings_of(shapes_shards, "unused", optimizer={"lr": 0.02, "clip_norm": clip}, precision="float64")
    manifest = read_manifest(shapes_shards)
    learner = Learner(settings, Inputs(10, manifest.mean, manifest.std), 10, CPU)
    parts = [(np.arange(20), slice(0, 20))]
    figures: dict = {}
    learner.step(list(read_ahead(Split(shapes_shards, manifest, "train"), parts, CPU, 1, 1)), 0, 0, figures)
    left = torch.cat([p.grad.flatten() for p in learner.model.parameters()]).norm()
    assert left.item() == pytest.approx(figures["gradient_norm"].item() if clip is None else clip, rel=1e-4)
    assert figures["gradient_norm"] > 0.05


def test_q2_logs_each_stage(stl_shards, tmp_path):
    settings = Q2(
        name="run", runs_dir=str(tmp_path), epochs=1, global_batch_size=20, log_every=2, wandb="off",
        data={"shards": str(stl_shards), "reader": "decode"}, model={"layers": (12, 9), "code_layer": 9},
        pretrain={"epochs": 1},
    )  # fmt: skip
    fit(settings, task="q2")
    assert list(dict.fromkeys(row["stage"] for row in rows(tmp_path))) == ["layer 1", "layer 2", "classifier"]
    assert all(row["gradient_norm"] > 0 for row in rows(tmp_path))


@pytest.mark.parametrize("mining", ["batch-hard", "semi-hard", "all"])
def test_the_share_of_active_triplets_by_hand(mining):
    x = torch.tensor([[0.0], [0.1], [5.0], [0.3]])
    labels = torch.tensor([0, 0, 1, 1])
    loss = TripletLoss(0.05, mining, normalize=False)
    triplets = [
        (a, p, n) for a in range(4) for p in range(4) for n in range(4)
        if a != p and labels[a] == labels[p] != labels[n]
    ]  # fmt: skip
    near, far = (lambda t: abs(x[t[0]] - x[t[1]])), (lambda t: abs(x[t[0]] - x[t[2]]))
    if mining != "all":  # one positive each
        own = [[t for t in triplets if t[0] == a] for a in range(4)]
        farther = [[t for t in some if mining == "batch-hard" or far(t) > near(t)] for some in own]
        triplets = [
            min(some, key=far) if some else max(all_of, key=far) for some, all_of in zip(farther, own, strict=True)
        ]
    active = [near(t) - far(t) + 0.05 > 0 for t in triplets]
    share = loss.active_share(x, labels)
    assert 0 < share.item() == sum(active).item() / len(active) < 1
    assert loss.active_share(x, torch.zeros(4, dtype=torch.long)).isnan()


def test_the_centres_spread_by_hand():
    loss = CenterLoss(2, 2)
    loss.centers.copy_(torch.tensor([[3.0, 0.0], [-3.0, 8.0]]))
    assert loss.spread().item() == 5


def test_what_is_not_finite_is_null_in_a_row():
    log = StepLog(1, 8, CPU)
    figures = log.place(1)
    log.add({"step": 1}, {"loss": torch.tensor(1.5, dtype=torch.float64), **figures, "share": torch.tensor(torch.nan)})
    value, (row,) = log.fetch(torch.tensor(2.0))
    assert (value, row["loss"], row["share"]) == (2.0, 1.5, None)
    assert log.fetch(torch.tensor(3.0)) == (3.0, [])


def test_memory_is_that_of_this_process(monkeypatch):
    assert memory(CPU) == pytest.approx(psutil.Process().memory_info().rss, rel=1e-2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    assert memory(torch.device("cuda")) == 7
