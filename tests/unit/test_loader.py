"""Epochs of a run as batches, and batches read ahead by threads."""

import itertools
import threading
import time

import numpy as np
import pytest
import torch

from dlops_dist.data.loader import TrainingOrder, read_ahead
from dlops_dist.data.order import hold_out, rank_part
from dlops_dist.data.pack import pack
from dlops_dist.data.shapes import write_tiny_imagenet
from dlops_dist.data.shards import Split, read_manifest
from dlops_dist.data.sources import TinyImageNet
from dlops_dist.engine.samples import balance_notices
from dlops_dist.errors import RunError, UserError

CPU = torch.device("cpu")


def reader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("reader")]


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Split:
    """40 images of 10 classes."""
    folder = tmp_path_factory.mktemp("shapes")
    write_tiny_imagenet(folder / "shapes.zip", train_per_class=4, test_per_class=1, size=16)
    manifest = pack(TinyImageNet(folder / "shapes.zip"), folder / "packed", "shapes", shard_size=15, workers=1)
    return Split(folder / "packed", manifest, "train")


class Images:
    """Images that hold their id. Reading one of the slow ids takes a while, reading the bad one fails."""

    in_memory = False

    def __init__(self, size: int, slow: frozenset[int] = frozenset(), bad: int = -1) -> None:
        self.labels = np.arange(size) % 7
        self.slow, self.bad = slow, bad
        self.started: list[int] = []

    def read(self, ids: np.ndarray) -> np.ndarray:
        self.started += ids.tolist()
        if self.slow & set(ids.tolist()):
            time.sleep(0.05)
        if self.bad in ids:
            raise UserError(f"image {self.bad} is damaged")
        return np.broadcast_to(ids.astype(np.uint8)[:, None, None, None], (len(ids), 2, 2, 3)).copy()


def whole(batches):
    """Batches for a single rank: all of each."""
    return ((ids, slice(0, len(ids))) for ids in batches)


# orders


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_uniform_epoch_holds_each_of_the_ids_once(drop_last):
    ids, labels = np.arange(3, 100, 2), np.zeros(100, np.int64)
    run = TrainingOrder(ids, labels, 0, 10, None, drop_last)
    assert run.steps_per_epoch == (4 if drop_last else 5)
    for epoch in (0, 1, 7):
        batches = list(run.epoch(epoch))
        assert [b.tolist() for b in run.epoch(epoch, 3)] == [b.tolist() for b in batches[3:]]
        assert [len(b) for b in batches] == [10] * 4 + [9] * (not drop_last)
        seen = np.concatenate(batches)
        assert len(np.unique(seen)) == len(seen)
        assert set(seen) <= set(ids)


def test_epochs_are_shuffled_anew_and_can_be_asked_for_in_any_order():
    def run() -> TrainingOrder:
        return TrainingOrder(np.arange(200), np.zeros(200, np.int64), 5, 20, None, True)

    forwards, one = run(), run()
    epochs = [np.concatenate(list(forwards.epoch(e))) for e in range(4)]
    assert np.array_equal(np.concatenate(list(one.epoch(3))), epochs[3])
    assert all((a == b).mean() < 0.05 for a, b in itertools.combinations(epochs, 2))


@pytest.mark.parametrize("samples_per_class", [None, 2])
def test_samples_that_are_held_out_are_never_trained_on(samples_per_class):
    labels = np.random.default_rng(0).integers(0, 5, 120)
    train, val = hold_out(labels, 0.25)
    run = TrainingOrder(train, labels, 0, 10, samples_per_class, False)
    seen = {int(i) for epoch in range(20) for batch in run.epoch(epoch) for i in batch}
    assert seen == set(train.tolist())
    assert not seen & set(val.tolist())


def test_balanced_batches_follow_the_labels_of_the_ids_that_are_left():
    labels = np.random.default_rng(1).integers(0, 6, 200)
    run = TrainingOrder(np.flatnonzero(labels != 3), labels, 0, 12, 3, True)
    for batch in run.epoch(2):
        classes, counts = np.unique(labels[batch], return_counts=True)
        assert counts.tolist() == [3] * 4
        assert 3 not in classes


def test_a_short_epoch_is_one_short_batch_or_refused(user_error):
    ids, labels = np.arange(6), np.zeros(6, np.int64)
    assert [len(b) for b in TrainingOrder(ids, labels, 0, 8, None, False).epoch(0)] == [6]
    with user_error("global_batch_size", 8, 6):
        TrainingOrder(ids, labels, 0, 8, None, True)


def test_balanced_batches_that_cannot_be_filled_are_refused(user_error):
    labels = np.repeat(np.arange(5), [40, 6, 1, 1, 1])
    with user_error("data.samples_per_class", "4 classes with 4", "2 of 5", "40, 6, 1, 1, 1", "--data.order uniform"):
        TrainingOrder(np.arange(49), labels, 0, 16, 4, True)
    assert TrainingOrder(np.arange(49), labels, 0, 16, 4, True, repeat=True).steps_per_epoch == 1


def test_what_balanced_batches_leave_out_is_said_by_count_and_class():
    labels, names = np.repeat(np.arange(5), [40, 6, 1, 1, 1]), ["big", "mid", "one", "uno", "eins"]

    def notice(k: int | None, repeat: bool = False) -> str | None:
        order = TrainingOrder(np.arange(49), labels, 0, 4 if k == 2 else 8, k, True, repeat)
        return "".join(balance_notices(order, names)) or None

    assert notice(None) is None
    said = str(notice(4))
    assert "3 of 49 samples, of 3 classes with fewer than 4: one, uno, eins" in said
    assert "all of them within 10 epochs" in said
    assert "leave out" not in str(notice(4, repeat=True))
    even = TrainingOrder(np.arange(40), np.arange(40) % 10, 0, 8, 4, True)
    assert balance_notices(even, names * 2) == []


# reading ahead


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (3, 4)])
def test_the_ranks_read_the_global_batches_in_order(world_size, threads, prefetch, split):
    batches = list(TrainingOrder(np.arange(38), split.labels, 0, 12, None, False).epoch(0))  # the last has 2 samples
    ranks = []
    for rank in range(world_size):
        parts = [(ids, rank_part(len(ids), rank, world_size)) for ids in batches]
        ranks.append(list(read_ahead(split, iter(parts), CPU, threads, prefetch)))
        assert len(ranks[-1]) == len(batches)
        for batch, (ids, part) in zip(ranks[-1], parts, strict=True):
            assert batch.part == part
            assert batch.ids.tolist() == ids[part].tolist()
            assert batch.labels.tolist() == split.labels[ids].tolist()
    for ids, *parts in zip(batches, *ranks, strict=True):
        assert np.array_equal(torch.cat([p.images for p in parts]).numpy(), split.read(ids))
    assert reader_threads() == []


def test_batches_come_in_order_whatever_is_read_first():
    images = Images(40, slow=frozenset({0, 8, 16}))
    read = read_ahead(images, whole(np.arange(40).reshape(10, 4)), CPU, threads=4, prefetch=4)
    assert [int(batch.images[0, 0, 0, 0]) for batch in read] == list(range(0, 40, 4))


@pytest.mark.parametrize("prefetch", [1, 3])
def test_no_more_than_prefetch_batches_are_read_before_they_are_wanted(prefetch):
    images = Images(100)
    read = read_ahead(images, whole(np.arange(100).reshape(50, 2)), CPU, threads=2, prefetch=prefetch)
    assert images.started == []
    for given in (1, 2, 3):
        next(read)
        deadline = time.monotonic() + 10
        while len(images.started) < 2 * (given + prefetch - 1) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert given + prefetch - 1 <= len(images.started) / 2 <= given + prefetch
    read.close()


def test_what_lies_in_memory_is_read_when_it_is_wanted_without_a_thread():
    images = Images(20)
    images.in_memory = True
    read = read_ahead(images, whole(np.arange(20).reshape(10, 2)), CPU, threads=2, prefetch=2)
    for first in range(0, 20, 2):
        assert next(read).ids.tolist() == images.started[first:] == [first, first + 1]
        assert reader_threads() == []
    assert list(read) == []


def test_batches_are_asked_for_only_as_they_are_read():
    endless = whole(np.array([i % 10, (i + 1) % 10]) for i in itertools.count())
    read = read_ahead(Images(10), endless, CPU, threads=2, prefetch=2)
    assert [batch.ids[0].item() for batch in itertools.islice(read, 12)] == [*range(10), 0, 1]
    read.close()
    assert reader_threads() == []


def test_an_error_in_a_reader_comes_after_the_batches_before_it():
    read = read_ahead(Images(20, bad=9), whole(np.arange(20).reshape(10, 2)), CPU, threads=2, prefetch=4)
    seen = []
    with pytest.raises(UserError, match="image 9 is damaged"):
        seen.extend(batch.ids[0].item() for batch in read)
    assert seen == [0, 2, 4, 6]
    assert reader_threads() == []


def test_a_damaged_shard_is_named_by_the_consumer(split, tmp_path, user_error):
    write_tiny_imagenet(tmp_path / "shapes.zip", train_per_class=1, test_per_class=1, size=16)
    pack(TinyImageNet(tmp_path / "shapes.zip"), tmp_path / "packed", "shapes", workers=1)
    shard = tmp_path / "packed" / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    damaged = Split(tmp_path / "packed", read_manifest(tmp_path / "packed"), "train")
    with user_error(shard):
        list(read_ahead(damaged, whole([np.arange(10)]), CPU, threads=1, prefetch=1))


def test_closing_early_ends_the_threads():
    images = Images(200, slow=frozenset(range(200)))
    read = read_ahead(images, whole(np.arange(200).reshape(100, 2)), CPU, threads=3, prefetch=60)
    next(read)
    assert reader_threads() != []
    read.close()
    assert reader_threads() == []
    assert len(images.started) < 120  # what was not begun is never read


def by_twos(seed, epoch, labels):
    """Neighbours by label, turned by the epoch."""
    return np.roll(np.argsort(labels, kind="stable"), epoch).reshape(-1, 2)


def order_of(batches):
    return TrainingOrder(np.arange(10, 20), np.arange(30) % 3, 0, 2, None, True, batches=batches)


def test_a_recipes_own_batches_are_places_among_the_samples():
    order, labels = order_of(by_twos), np.arange(10, 20) % 3
    assert order.steps_per_epoch == 5
    for epoch in (0, 3):
        expected = [[10 + int(i) for i in pair] for pair in by_twos(0, epoch, labels)]
        assert [batch.tolist() for batch in order.epoch(epoch)] == expected


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        (lambda seed, epoch, labels: [[0, 10]], "places must be from 0 to 9, not 10"),
        (lambda seed, epoch, labels: [[-1, 3]], "places must be from 0 to 9, not -1"),
        (lambda seed, epoch, labels: [[0, 1, 2]], "global_batch_size 2 samples, not 3"),
        (lambda seed, epoch, labels: [[0.5, 1.0]], "whole numbers"),
        (lambda seed, epoch, labels: [[[0, 1]]], "one-dimensional"),
        (lambda seed, epoch, labels: [], "epoch 0 has none"),
        (lambda seed, epoch, labels: 3, "must give a list of batches, not a int"),
    ],
)
def test_batches_that_are_none_are_refused(batches, words):
    with pytest.raises(RunError, match=words):
        order_of(batches)


def test_epochs_of_other_lengths_are_refused():
    with pytest.raises(RunError, match="epoch 1 has 2 batches, the first has 1"):
        order_of(lambda seed, epoch, labels: [[0, 1]] * (epoch + 1)).epoch(1)


@pytest.mark.parametrize("part", [slice(0, 4), slice(4, 4), slice(4, 7)])
def test_the_image_after_a_ranks_part_is_read_too(part):
    reader, ids = Images(10), np.array([5, 3, 9, 0, 7, 1, 2])
    (batch,) = read_ahead(reader, [(ids, part)], CPU, 1, 1, and_next=True)
    expected = [int(ids[i % 7]) for i in range(part.start, part.stop + 1)]
    assert batch.ids.tolist() == expected
    assert batch.images[:, 0, 0, 0].tolist() == expected
    assert batch.labels.tolist() == (ids % 7).tolist()
