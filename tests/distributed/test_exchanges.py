"""How often ranks exchange something in a step, and how much: golden numbers, beside formulas."""

import sys
from pathlib import Path
from unittest import mock

import pytest
from kept_ranks import on_ranks

from dlops_dist.distributed import norm
from dlops_dist.engine import gradients

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import wire

SMALL = {"width": 8, "stem": "imagenet"}
CENTER, TRIPLET = {"loss": "center", "model": SMALL}, {"loss": "triplet", "model": SMALL}
SYNC = {"model": {**SMALL, "norm": "sync"}}
EXCHANGES = {
    "ce": ({"model": SMALL}, 256, 1, 3),  # the losses; all-to-all and all-gather of the gradients
    "ce, two micro-batches": ({"model": SMALL}, 256, 2, 4),  # the losses of each
    "center": (CENTER, 256, 1, 3),  # the centres' sums with the gradients
    "center, two micro-batches": (CENTER, 256, 2, 4),
    "center, more classes than samples": (CENTER, 128, 1, 4),  # the embeddings
    "triplet": (TRIPLET, 128, 1, 5),  # the embeddings, and all-to-all of their gradients
    "triplet, two micro-batches": (TRIPLET, 128, 2, 7),  # the other loss of each micro-batch
    "ce, sync": (SYNC, 128, 1, 3 + 2 * 20),  # of each of twenty norms, once in each direction
    "triplet, sync": ({**TRIPLET, **SYNC}, 128, 1, 5 + 2 * 20),
}  # fmt: skip
"""{what: (settings, samples, micro-batches, exchanges of a step)}"""


@pytest.mark.parametrize("what", EXCHANGES)
def test_a_step_exchanges_as_little_as_it_needs(what):
    changes, batch, micro_batches, expected = EXCHANGES[what]
    found = on_ranks(wire.sent_in_a_step, 2, changes, batch, micro_batches)
    assert [len(of_rank) for of_rank in found] == [expected] * 2
    assert [name for name, _ in found[0]] == [name for name, _ in found[1]]


def sent_in_a_step_of_many(changes, batch):
    """As of more ranks than are gathered from."""
    with mock.patch.object(norm, "GATHERED", 1):
        return wire.sent_in_a_step(changes, batch)


def test_norms_over_many_ranks_send_as_much_however_many_they_are():
    """And over few ranks what the formula says: at most 1 % of ResNet-18's gradients for any number of them."""
    own = {}
    for ranks in (2, 3, 4):
        found = on_ranks(sent_in_a_step_of_many, ranks, SYNC, 96)[0]
        of_norms = [size for name, size in found if name == "all_reduce"]
        assert len(of_norms) == 3 * 20
        own[ranks] = sum(of_norms) * ranks / (ranks - 1)
    assert own[2] == pytest.approx(own[3], rel=0.01) == pytest.approx(own[4], rel=0.01)
    channels, parameters = [64] * 5 + [128] * 5 + [256] * 5 + [512] * 5, 11.17e6
    for ranks in (2, 4, 8, 9, 64, 1024, 10**6):
        values = sum(wire.sync_norm_values(ranks, c) for c in channels)
        assert values <= 0.01 * 2 * (ranks - 1) * parameters


def test_large_gradients_take_two_exchanges_for_each_bucket():
    found = on_ranks(sent_in_small_buckets, 2)[0]
    names = [name for name, _ in found]
    assert names.count("all_to_all_single") == len(names) // 2 > 4


def sent_in_small_buckets():
    with mock.patch.object(gradients, "BUCKET", 2**16):
        return wire.sent_in_a_step({"model": SMALL}, 256)
