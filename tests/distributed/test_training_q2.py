"""q2, 1 process against 2, 3 and 4 ranks: every stage's step, the codes between them, a whole run, a resume."""

import json
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from covering import covering
from kept_ranks import on_ranks
from states import distance, nearly, tensors, with_total_sums

from dlops_dist.data.loader import read_ahead
from dlops_dist.data.order import blocks
from dlops_dist.data.shards import read_manifest
from dlops_dist.distributed.collectives import rank
from dlops_dist.engine import fit, prepare
from dlops_dist.engine.fit import _Fit
from dlops_dist.engine.prepare import stages_of
from dlops_dist.engine.samples import Samples
from dlops_dist.recipes.q2 import Settings as Q2
from dlops_dist.recipes.stacked import codes
from dlops_dist.recipes.stacked.stages import Shared

CPU = torch.device("cpu")
KINDS = {
    "tied, masked": {"model": {"tied": True, "standardize": False}, "pretrain": {"corruption": "masking"}},
    "batch norm, noise, dropout": {
        "model": {"norm": "sync", "dropout": 0.3}, "pretrain": {"corruption": "gaussian"}, "finetune": True,
        "ema_decay": 0.9, "flip_test": True,
    },
    "layer norm, codes not kept": {
        "model": {"norm": "layer", "standardize": False}, "pretrain": {"codes_gb": 0}, "finetune": True,
    },
}  # fmt: skip
STAGES = ("layer 1", "layer 2", "layer 3", "joint", "classifier")


def settings_of(kind, shards, runs, **changes):
    """Fourteen float64 steps in five stages; 22 samples a step, which neither 3 nor 4 ranks share evenly."""
    values = {
        "name": "run", "runs_dir": str(runs), "epochs": 2, "global_batch_size": 22, "precision": "float64",
        "exactness": "rounding",
        "data": {"shards": str(shards), "reader": "decode", "val_fraction": 0.125},
        "optimizer": {"lr": 0.02}, **KINDS[kind], **changes,
    }  # fmt: skip
    values["model"] = {"layers": (12, 9, 5), "code_layer": 9, **values["model"]}
    values["pretrain"] = {"epochs": 1, "joint_epochs": 1, "optimizer": {"lr": 0.2}, **values["pretrain"]}
    return Q2(**values)


BATCHES = {
    "mixed": ([*range(20), 81, 82], None),
    "fewer samples than ranks": ([1, 90, 9], None),
    "duplicates, in micro-batches": ([5, 30, 5, 9, 11, 31, 9, 120, 5, 7, 40, 41], 5),
}


def one_step(stage, ids, size):
    """What a step on one global batch leaves: the state of the stage's learner, gradients, and its figures."""
    learner = stage.learner()
    reader = stage.reader(learner)
    parts = [(part, learner.blocks.share(len(part))) for part in blocks(np.array(ids), size)]
    value = learner.step(list(read_ahead(reader, parts, CPU, 1, len(parts))), epoch=3, step=5)
    gradients = {n: p.grad for n, p in learner.model.named_parameters() if p.grad is not None}
    figures = {n: torch.tensor([v]) for n, v in stage.figures(learner).items() if isinstance(v, float)}
    state = with_total_sums(learner.state_dict())
    return tensors({"value": value, "gradients": gradients, "figures": figures, **state})


def steps(cases, shards):
    """{(kind, stage, batch): one step from equal state}."""
    results = {}
    for kind, name, batch in cases:
        settings = settings_of(kind, shards, "unused")
        samples = Samples(Path(shards), read_manifest(Path(shards)), settings)
        stage = stages_of(settings, samples, CPU)[STAGES.index(name)]
        assert stage.name == name
        ids, size = BATCHES[batch]
        results[kind, name, batch] = one_step(stage, [i % 80 for i in ids] if name == "classifier" else ids, size)
    return results


CASES = list(product((2, 3, 4), KINDS, STAGES, BATCHES))
FEW = covering((2, 3, 4), list(KINDS), STAGES, list(BATCHES))


OTHERS = [case for case in CASES if case not in FEW]
LATER = [(ranks, cases) for ranks, cases in product((2, 3, 4), (FEW, OTHERS)) if (ranks, cases) != (3, FEW)]


@pytest.mark.parametrize(
    ("ranks", "cases"), [(3, FEW), *(pytest.param(*case, marks=pytest.mark.slow) for case in LATER)]
)
def test_one_step_of_each_stage_on_any_number_of_ranks_is_that_of_one_process(ranks, cases, stl_shards):
    """Few: of kind, stage, batch and number of ranks, each value meets each of another."""
    cases = [case[1:] for case in cases if case[0] == ranks]
    expected = steps(cases, stl_shards)
    results = on_ranks(steps, ranks, cases, stl_shards)
    for case, theirs in expected.items():
        assert results[0][case].keys() == theirs.keys()
        for path, value in theirs.items():
            assert distance(results[0][case][path], value) <= 1e-12, (case, path)
        for other in results[1:]:
            for path, value in results[0][case].items():
                assert torch.equal(other[case][path].nan_to_num(), value.nan_to_num()), (case, path)


def test_a_layer_learns_on_the_codes_of_the_one_below(stl_shards):
    case = "tied, masked", "layer 2", "mixed"
    gradients = steps([case], stl_shards)[case]
    assert any(path.startswith("/gradients/1.") and value.norm() > 0 for path, value in gradients.items())


def all_codes(shards):
    """Codes of every image at each depth, in blocks of 16: made one depth from another, and from pixels."""
    with mock.patch.object(codes, "BLOCK", 16):
        return codes_in_blocks(shards)


def codes_in_blocks(shards):
    settings = settings_of("batch norm, noise, dropout", shards, "unused", precision="float32")
    shared = Shared(settings, Samples(Path(shards), read_manifest(Path(shards)), settings), CPU, print)
    found = {}
    for depth in (1, 2):
        for name, reader in shared.codes.at(depth).items():
            found[name, depth] = reader.codes
    shared.codes.at(0)
    assert all(torch.equal(reader.codes, found[name, 2]) for name, reader in shared.codes.at(2).items())
    pixels = torch.as_tensor(shared.codes.at(0)["train"].read(np.arange(16, 32)))
    assert torch.equal(shared.codes.encode(pixels, 2), found["train", 2][16:32])
    return found


def test_codes_are_the_same_bits_on_any_number_of_ranks(stl_shards):
    (expected,) = on_ranks(all_codes, 1, stl_shards)
    assert expected["train", 2].shape == (125, 9)
    for ranks in (2, 3, 4):
        for found in on_ranks(all_codes, ranks, stl_shards):
            assert all(torch.equal(found[where], value) for where, value in expected.items())


def test_codes_that_do_not_fit_are_told_once_and_not_kept(stl_shards):
    """125 images of 12 float64 values, and 30 to test on, are 14.9 kB; of 9, 11.2 kB."""
    told = []
    settings = settings_of("tied, masked", stl_shards, "unused", pretrain={"codes_gb": 12e-6})
    shared = Shared(settings, Samples(stl_shards, read_manifest(stl_shards), settings), CPU, told.append)
    for _ in range(2):
        assert shared.codes.at(1) is shared.codes.at(0)
    assert set(shared.codes.at(2)) == {"train", "test"}
    assert shared.codes.at(2)["train"].codes.shape == (125, 9)
    assert shared.codes.at(2)["test"].codes.shape == (30, 9)
    assert ["in every step" in line for line in told] == [True, False]


def trained(kind, shards, runs, **changes):
    """Train on this rank's share; the last checkpoint and the rows of metrics."""
    fit(settings_of(kind, shards, runs, **changes), task="q2")
    return left(runs)


def left(runs):
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the first rank ends once its last checkpoint is written
    checkpoint = torch.load(sorted(Path(runs).glob("run/checkpoints/*.pt"))[-1], weights_only=True)
    return checkpoint, [json.loads(line) for line in (Path(runs) / "run/metrics.jsonl").read_text().splitlines()]


def compare(ours, theirs, where):
    """Checkpoints and rows of two runs that differ in rounding alone."""
    for path, value in tensors(with_total_sums(theirs[0])).items():
        assert distance(tensors(with_total_sums(ours[0]))[path], value) <= 1e-6, (where, path)
    for row, expected in zip(ours[1], theirs[1], strict=True):
        same = {k: v for k, v in expected.items() if not k.endswith("_s")}
        assert {k: row[k] for k in same} == nearly(same), where


WHOLE = "batch norm, noise, dropout"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ranks"), [(WHOLE, 4), ("tied, masked", 2)])
def test_a_whole_run_on_any_number_of_ranks_is_that_of_one_process(kind, ranks, stl_shards, tmp_path):
    expected = trained(kind, stl_shards, tmp_path / "1")
    assert expected[0]["step"] == 26
    assert [row["stage"] for row in expected[1]] == [*STAGES, "classifier"]
    compare(on_ranks(trained, ranks, kind, stl_shards, tmp_path / "ranks")[0], expected, ranks)


class StoppedError(Exception):
    """What stands for a machine that goes down."""


def stopped(shards, runs, after, precision="float64"):
    """Train until a checkpoint was written after so many steps."""
    settings = settings_of("batch norm, noise, dropout", shards, runs, checkpoint_every=1, precision=precision)
    fit_run = _Fit(with_folder(settings), CPU, [])
    save = fit_run._save

    def save_then_stop(step):
        save(step)
        if step == after:
            fit_run.folder.checkpoints.wait()
            raise StoppedError

    fit_run._save = save_then_stop
    with pytest.raises(StoppedError):
        fit_run.run()


def with_folder(settings):
    from dlops_dist.engine.run_folder import RunFolder

    settings = prepare("q2", settings)
    if rank() == 0:
        RunFolder(Path(settings.runs_dir) / "run").create("q2", settings)
    return settings


@pytest.fixture(scope="module")
def whole(stl_shards, tmp_path_factory):
    """A run that nothing stopped: its last checkpoint and rows."""
    return resumed(stl_shards, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(("after", "stage"), [(10, "layer 2"), (21, "classifier")])
def test_a_run_that_stops_in_any_stage_goes_on_to_the_same_bits(after, stage, whole, stl_shards, tmp_path):
    """In one process. Step 10 is the end of a stage, the others lie inside of one."""
    stopped(stl_shards, tmp_path, after)
    assert left(tmp_path)[0]["stage"] == stage
    ours = resumed(stl_shards, tmp_path)
    same_bits(ours, whole)


def same_bits(ours, theirs):
    for path, value in tensors(theirs[0]).items():  # the mean of a class without samples is NaN
        assert torch.equal(tensors(ours[0])[path].nan_to_num(), value.nan_to_num()), path
    assert [plain(row) for row in ours[1]] == [plain(row) for row in theirs[1]]


def plain(row):
    return {name: value for name, value in row.items() if not name.endswith("_s")}


@pytest.mark.slow
def test_a_run_that_stops_on_two_ranks_goes_on_on_three(whole, stl_shards, tmp_path):
    on_ranks(stopped, 2, stl_shards, tmp_path, 8)
    assert len(left(tmp_path)[0]["sums"]["counts"]) == 2
    compare(on_ranks(resumed, 3, stl_shards, tmp_path)[0], whole, "moved")


def resumed(shards, runs, precision="float64"):
    return trained("batch norm, noise, dropout", shards, runs, checkpoint_every=1, precision=precision)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stops"), [(3, (7, 12, 21))])
def test_a_run_that_stops_in_any_stage_goes_on_to_the_same_bits_on_as_many_ranks(ranks, stops, stl_shards, tmp_path):
    whole = on_ranks(resumed, ranks, stl_shards, tmp_path / "whole", "float32")[0]
    for after in stops:
        runs = tmp_path / str(after)
        on_ranks(stopped, ranks, stl_shards, runs, after, "float32")
        same_bits(on_ranks(resumed, ranks, stl_shards, runs, "float32")[0], whole)


def test_folds_start_from_the_same_encoders_and_see_their_own_samples(stl_shards, tmp_path):
    """Also where the run stops within a fold: then the pretrained encoders come from the checkpoint."""
    changes = {"folds": True, "global_batch_size": 8, "checkpoint_every": 1, "epochs": 1}
    changes["data"] = {"shards": str(stl_shards), "reader": "decode"}
    whole = trained("batch norm, noise, dropout", stl_shards, tmp_path / "whole", **changes)
    assert [row["stage"] for row in whole[1]][4:] == [f"fold {fold}" for fold in range(10)]
    settings = settings_of("batch norm, noise, dropout", stl_shards, tmp_path / "whole", **changes)
    samples = Samples(stl_shards, read_manifest(stl_shards), settings)
    orders = [np.sort(np.concatenate(list(stage.order.epoch(0)))) for stage in stages_of(settings, samples, CPU)[4:]]
    assert [len(ids) for ids in orders] == [8] * 10
    assert np.array_equal(np.sort(np.concatenate(orders)), np.arange(80))
    max((tmp_path / "whole/run/checkpoints").iterdir()).unlink()  # the last fold anew, from where the one before ended
    ours = trained("batch norm, noise, dropout", stl_shards, tmp_path / "whole", **changes)
    same_bits(ours, whole)
