"""What is said of figures that cannot be."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from kept_ranks import on_ranks
from states import nearly
from torch import nn

from dlops_dist.config import load_recipe
from dlops_dist.console import epoch_line
from dlops_dist.data.loader import read_ahead
from dlops_dist.distributed.collectives import rank
from dlops_dist.distributed.norm import SyncBatchNorm1d, SyncBatchNorm2d
from dlops_dist.engine import evaluation
from dlops_dist.engine.evaluation import evaluate
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.samples import Inputs
from dlops_dist.errors import RunError
from dlops_dist.figures import figure
from dlops_dist.recipes.q1 import Settings as Q1

CPU = torch.device("cpu")


class Images:
    """Random images with these labels, in memory."""

    in_memory = True

    def __init__(self, labels) -> None:
        self.labels = np.array(labels)
        self.pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 16, 16, 3), np.uint8)

    def read(self, ids: np.ndarray) -> np.ndarray:
        return self.pixels[ids]


def figures_of(labels, same=None, **values):
    """Of a new model on random images; `same` says which of them are copies of which."""
    learner, images = (
        Learner(Q1(model={"width": 8}, **values), Inputs(5, (0.5,) * 3, (0.25,) * 3), 1, CPU),
        Images(labels),
    )
    for copy, original in (same or {}).items():
        images.pixels[copy] = images.pixels[original]
    return evaluate(learner, images, np.arange(len(labels)))


@pytest.mark.parametrize("labels", [[3], [0, 1, 2, 4]], ids=["one sample", "no pair"])
def test_figures_that_need_a_pair_are_null_without_one(labels):
    figures = figures_of(labels, loss="triplet", triplet={"ce_weight": 1.0})
    assert figures["recall_at_1"] is figures["triplet"] is figures["loss"] is None
    assert figures["ce"] > 0
    assert json.loads(json.dumps(figures)) == figures
    row = {f"test/{name}": value for name, value in figures.items()}
    line = epoch_line({"epoch": 1, "train_images_per_s": 1.0, "epoch_s": 1.0, **row}, 2)
    assert "test loss - top-1" in line
    assert "Recall@1 -" in line


def test_a_loss_without_weight_does_not_undo_the_whole():
    figures = figures_of([0, 1, 2, 4], loss="triplet")  # trains no head: CE has no weight
    assert figures["loss"] is None
    figures = figures_of([0, 1, 2, 4], loss="center")
    assert figures["loss"] == pytest.approx(figures["ce"] + 0.01 * figures["center"])
    assert figures["recall_at_1"] is None


def test_with_a_pair_they_are_numbers():
    figures = figures_of([0, 0, 1], loss="triplet")
    assert all(isinstance(figures[name], float) for name in ("loss", "triplet", "recall_at_1"))


OPEN_SET = str(Path(__file__).parents[2] / "examples/open_set_retrieval.py")


def open_set_figures():
    """Of samples whose classes training never saw, in blocks of 8: several for each rank, and none for some."""
    settings = load_recipe(OPEN_SET).settings_type(precision="float32")
    learner = Learner(settings, Inputs(5, (0.5,) * 3, (0.25,) * 3, (16, 16)), 1, CPU)
    learner.class_means[2:] = 0.0
    found = []
    with mock.patch.object(evaluation, "BLOCK", 8):
        for labels in (np.arange(37) % 2, np.arange(13) // 7, np.arange(2)):
            found.append(evaluate(learner, Images(labels), np.arange(len(labels))))
    return found


def test_retrieval_in_an_open_set_is_equal_on_any_number_of_ranks():
    (expected,) = on_ranks(open_set_figures, 1)
    names = ["loss", "recall_at_1", "map_at_r", "recall_at_2", "recall_at_4", "recall_at_8"]
    assert [list(figures) for figures in expected] == [names] * 3
    assert [[value is None for value in figures.values()] for figures in expected] == [[1, *[0] * 5]] * 2 + [[1] * 6]
    for ranks in (2, 3):
        assert on_ranks(open_set_figures, ranks) == [expected] * ranks


def trained_figures(labels, steps, **values):
    """Of an epoch of some steps, each on these samples, on this rank."""
    settings = Q1(
        model={"width": 8, "norm": "sync"}, precision="float64", loss="triplet", optimizer={"lr": 0.001}, **values
    )
    learner = Learner(settings, Inputs(5, (0.5,) * 3, (0.25,) * 3), len(steps), CPU)
    batches = [(np.array(ids), learner.blocks.share(len(ids))) for ids in steps]
    for step, batch in enumerate(read_ahead(Images(labels), batches, CPU, 1, 1)):
        learner.step([batch], 0, step)
    return learner.end_epoch()


LABELS = [0, 1, 2, 0, 0, 4]
WITH, NO_PAIR, ONE_CLASS = [0, 1, 3], [0, 1, 2, 5], [0, 3, 4]


@pytest.mark.parametrize("average", ["valid", "active"])
def test_the_triplet_loss_of_an_epoch_without_a_triplet_is_null_on_any_number_of_ranks(average):
    values = {"triplet": {"average": average}}
    none = trained_figures(LABELS, [NO_PAIR, ONE_CLASS], **values)
    assert none["triplet"] is none["loss"] is None
    assert none["ce"] > 0
    row = {f"train/{name}": value for name, value in none.items()}
    shown = epoch_line({"epoch": 1, "train_images_per_s": 1.0, "epoch_s": 1.0, **row}, 2)
    assert f"train loss - top-1 {none['top1']:.2%}" in shown
    assert json.loads(json.dumps(none)) == none
    some = trained_figures(LABELS, [NO_PAIR, WITH, ONE_CLASS], **values)
    for ranks in (2, 3):
        for result in on_ranks(figures_with_and_without, ranks, values):
            assert result == [nearly(none, 1e-9), nearly(some, 1e-9)]


def figures_with_and_without(values):
    return [trained_figures(LABELS, steps, **values) for steps in ([NO_PAIR, ONE_CLASS], [NO_PAIR, WITH, ONE_CLASS])]


def test_the_triplet_loss_of_an_epoch_is_the_mean_over_steps_with_a_triplet():
    alone = trained_figures(LABELS, [WITH])["triplet"]
    assert trained_figures(LABELS, [WITH, NO_PAIR])["triplet"] == pytest.approx(alone, rel=1e-12)


def test_a_margin_that_all_triplets_keep_is_a_loss_of_0_by_either_average():
    for average in ("valid", "active"):
        far = {"margin": 0.0, "normalize": False, "average": average}
        assert figures_of([0, 0, 1], loss="triplet", triplet=far, same={0: 1})["triplet"] == 0.0
        assert figures_of([0, 1, 2], loss="triplet", triplet=far)["triplet"] is None


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("test/loss", 1.23456, "1.2346"),
        ("test/loss", None, "-"),
        ("test/top1", 0.5, "50.00%"),
        ("test/top1", 0.0, "0.00%"),
    ],
)
def test_figures_are_shown(name, value, shown):
    assert figure({name: value}, name) == shown
    assert figure({}, name) == "-"


@pytest.mark.parametrize(("norm", "shape"), [(SyncBatchNorm1d, (1, 3)), (SyncBatchNorm2d, (1, 3, 1, 1))])
def test_a_norm_of_one_value_is_one_line(norm, shape):
    with pytest.raises(ValueError, match="more than 1 value"):
        nn.BatchNorm1d(3)(torch.randn(1, 3))
    with pytest.raises(RunError, match=r"3 channels.*--micro-batch-size") as caught:
        norm(3)(torch.randn(shape))
    assert len(str(caught.value).splitlines()) == 1
    norm(3).eval()(torch.randn(shape))


def normalised(sizes):
    return SyncBatchNorm1d(3)(torch.randn(sizes[rank()], 3)).shape


def test_ranks_with_one_value_together_are_one_line_and_with_two_are_not():
    with pytest.raises(RunError, match="one value in each of 3 channels"):
        on_ranks(normalised, 2, [1, 0])
    assert on_ranks(normalised, 2, [1, 1]) == [(1, 3), (1, 3)]
