"""The order of samples: permutations, whole epochs, balanced batches, held-out samples, parts of ranks."""

import hashlib
import random
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlops_dist.data import keys, order
from dlops_dist.data.keys import key

MASK = 2**64 - 1
seeds = st.integers(0, 2**32 - 1)
epochs = st.integers(0, 1000)
few = settings(max_examples=60, deadline=None)


def philox_bits(philox_key: int, size: int) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011) in Python integers; numpy counts from 1."""
    bits: list[int] = []
    while len(bits) < size:
        c, k = [len(bits) // 4 + 1, 0, 0, 0], [philox_key, 0]
        for _ in range(10):
            a, b = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
            c = [b >> 64 ^ c[1] ^ k[0], b & MASK, a >> 64 ^ c[3] ^ k[1], a & MASK]
            k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
        bits += c
    return bits[:size]


def rows_of(balance: order.Balance, seed: int, epoch: int) -> np.ndarray:
    """(steps, G), the batches of a balanced epoch."""
    rows = list(balance.epoch(seed, epoch))
    return np.stack(rows) if rows else np.empty((0, balance.classes_per_batch * balance.samples_per_class), np.int64)


def shuffles(size: int, number: int) -> np.ndarray:
    """(number, size): one permutation for each of many keys, as epochs of a run give them."""
    return np.stack([order.shuffled(key(7, epoch, "order"), size) for epoch in range(number)])


# keys


@pytest.mark.parametrize(
    ("seed", "outputs"),
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]),
    ],
)
def test_mix_gives_the_published_outputs_of_splitmix64(seed, outputs):
    assert [keys.mix(seed + i * keys.GOLDEN & MASK) for i in (1, 2, 3)] == outputs


@few
@given(st.integers(0, MASK))
def test_mix_can_be_inverted(x):
    def unshift(y: int, bits: int) -> int:
        known = y
        for _ in range(64 // bits):
            known = y ^ known >> bits
        return known

    y = unshift(keys.mix(x), 31) * pow(0x94D049BB133111EB, -1, 2**64) & MASK
    y = unshift(y, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) & MASK
    assert unshift(y, 30) == x


def test_every_input_bit_of_mix_changes_half_of_the_output_bits():
    draw = random.Random(0)
    inputs = [draw.getrandbits(64) for _ in range(64)]
    for bit in range(64):
        flipped = [(keys.mix(x) ^ keys.mix(x ^ 1 << bit)).bit_count() for x in inputs]
        assert 30 < sum(flipped) / len(flipped) < 34  # 32 +- 0.5


def test_keys_differ_by_seed_epoch_and_purpose():
    all_keys = [key(s, e, p) for s in range(30) for e in range(30) for p in keys.PURPOSES]
    assert len(set(all_keys)) == len(all_keys)
    assert all(0 <= k < 2**64 for k in all_keys)


def test_a_purpose_that_is_not_listed_is_refused():
    with pytest.raises(ValueError):
        key(0, 0, "coffee")


# shuffled


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 63, 64, 65, 1000, 1023, 1024, 4097])
def test_shuffled_is_a_permutation(size):
    ids = order.shuffled(12345, size)
    assert ids.dtype == np.int64
    assert sorted(ids.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("shuffle_key", [0, 12345, MASK])
def test_shuffled_sorts_ids_by_the_bits_of_philox(shuffle_key, size):
    bits, low = philox_bits(shuffle_key, size), len(f"{size:b}")
    assert order.shuffled(shuffle_key, size).tolist() == sorted(range(size), key=lambda i: (bits[i] >> low, i))


def test_shuffles_differ_by_seed_and_by_epoch():
    first = order.shuffled(key(0, 0, "order"), 100)
    for other in (key(1, 0, "order"), key(0, 1, "order"), key(0, 0, "class order")):
        in_place = int((first == order.shuffled(other, 100)).sum())
        assert in_place < 8  # 1 +- 1 for unrelated permutations


def test_every_id_comes_to_every_place_equally_often():
    number, size = 4000, 8
    drawn = shuffles(size, number)
    counts = np.stack([np.bincount(drawn[:, place], minlength=size) for place in range(size)])
    chi2 = ((counts - number / size) ** 2 / (number / size)).sum()
    assert chi2 < 49 + 5 * np.sqrt(2 * 49)  # (size - 1)^2 degrees of freedom


def test_all_permutations_are_equally_frequent():
    drawn = shuffles(4, 4800)
    _, counts = np.unique(drawn @ [64, 16, 4, 1], return_counts=True)
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 23 + 5 * np.sqrt(2 * 23)


def test_large_shuffles_are_not_correlated_with_the_ids_nor_with_the_next_epoch():
    size = 20_000
    a, b = (order.shuffled(key(0, epoch, "order"), size) for epoch in (0, 1))
    for x, y in ((a, np.arange(size)), (a, b), (a[1:], a[:-1])):
        assert abs(np.corrcoef(x, y)[0, 1]) < 4.5 / np.sqrt(size)


# uniform epochs


@few
@given(seeds, epochs, st.integers(0, 60), st.integers(1, 20))
def test_an_epoch_with_its_last_batch_holds_every_id_once(seed, epoch, size, batch):
    batches = [ids.tolist() for ids in order.uniform_epoch(seed, epoch, size, batch, drop_last=False)]
    assert [len(ids) for ids in batches] == [batch] * (size // batch) + [size % batch] * (size % batch > 0)
    assert sorted(i for ids in batches for i in ids) == list(range(size))
    assert [ids.tolist() for ids in order.uniform_epoch(seed, epoch, size, batch)] == batches[: size // batch]
    rest = order.uniform_epoch(seed, epoch, size, batch, drop_last=False, first=len(batches) // 2)
    assert [ids.tolist() for ids in rest] == batches[len(batches) // 2 :]


@few
@given(seeds, epochs, st.integers(1, 60), st.integers(1, 20), st.integers(1, 20))
def test_the_order_does_not_depend_on_the_batch_size(seed, epoch, size, batch_a, batch_b):
    a, b = ([*order.uniform_epoch(seed, epoch, size, g, drop_last=False)] for g in (batch_a, batch_b))
    assert np.concatenate(a).tolist() == np.concatenate(b).tolist()


# balanced epochs


@cache
def most_batches(groups: tuple[int, ...], classes_per_batch: int) -> int:
    """By trying every choice of classes for every batch."""
    best = 0
    for chosen in combinations(range(len(groups)), classes_per_batch):
        if all(groups[c] for c in chosen):
            left = tuple(sorted(g - (c in chosen) for c, g in enumerate(groups)))
            best = max(best, 1 + most_batches(left, classes_per_batch))
    return best


def test_brute_force_on_cases_done_by_hand():
    assert most_batches((3, 1, 1), 2) == 2
    assert most_batches((2, 2, 2), 2) == 3
    assert most_batches((5, 1, 1), 3) == 1


@st.composite
def balanced_cases(draw):
    sizes = draw(st.lists(st.integers(0, 13), min_size=1, max_size=5).filter(any))
    samples_per_class = draw(st.integers(2, 4))
    classes_per_batch = draw(st.integers(1, 4))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    draw(st.randoms(use_true_random=False)).shuffle(labels)
    return labels, classes_per_batch, samples_per_class, draw(seeds), draw(epochs)


@settings(max_examples=150, deadline=None)
@given(balanced_cases())
def test_balanced_batches_hold_p_classes_of_k_samples_as_often_as_can_be(case):
    labels, p, k, seed, epoch = case
    batches = rows_of(order.Balance(labels, p * k, k), seed, epoch)
    assert batches.shape[1:] == (p * k,)
    for batch in batches:
        classes, counts = np.unique(labels[batch], return_counts=True)
        assert len(classes) == p
        assert (counts == k).all()
    assert len(np.unique(batches)) == batches.size  # nothing twice in an epoch
    groups = np.bincount(labels) // k
    assert len(batches) == most_batches(tuple(sorted(groups.tolist())), p)


@settings(max_examples=80, deadline=None)
@given(balanced_cases(), st.integers(1, 9))
def test_every_rank_part_of_a_balanced_batch_holds_as_many_classes_as_it_can(case, world_size):
    labels, p, k, seed, epoch = case
    for batch in rows_of(order.Balance(labels, p * k, k), seed, epoch):
        for rank in range(world_size):
            part = batch[order.rank_part(p * k, rank, world_size)]
            assert len(np.unique(labels[part])) == min(len(part), p)


@few
@given(balanced_cases(), st.booleans())
def test_balanced_batches_are_those_of_the_class_with_most_groups_left_written_out(case, repeat):
    """Class by class, batch by batch, with a look at all that is left before each choice."""
    labels, p, k, seed, epoch = case
    balance = order.Balance(labels, p * k, k, repeat)
    members = {c: np.flatnonzero(labels == c) for c in np.unique(labels).tolist()}
    if repeat:
        members = {c: np.resize(m, max(k, len(m))) for c, m in members.items()}
    groups = {c: min(len(m) // k, balance.num_batches) for c, m in members.items() if len(m) >= k}
    groups = {c: number for c, number in groups.items() if number}
    spare, left, begun = sum(groups.values()) - balance.num_batches * p, {}, {}
    for place, (c, number) in enumerate(groups.items()):
        times = [max(0, -((place - e * spare) // len(groups))) for e in (epoch, epoch + 1)]
        left[c], begun[c] = number - (times[1] - times[0]), epoch * number - times[0]
    ties = iter(order.shuffled(key(seed, epoch, "class order"), sum(left.values()) + int(labels.max()) + 1).tolist())
    rows = {}
    for c, number in left.items():
        own = members[c]
        if number * k < len(own):
            turned = own[order.shuffled(key(seed, 0, "rotation") ^ c, len(own))]
            own = np.array([turned[(begun[c] * k + i) % len(own)] for i in range(number * k)], np.int64)
        rows[c] = own[order.shuffled(key(seed, epoch, "order") ^ c, len(own))].reshape(-1, k)
    tie = {c: next(ties) for c, number in left.items() if number}
    expected = []
    for _ in range(balance.num_batches):
        chosen = sorted((c for c in left if left[c]), key=lambda c: (-left[c], tie[c]))[:p]
        expected.append([int(rows[c][-left[c]][j]) for j in range(k) for c in chosen])
        for c in chosen:
            left[c] -= 1
            if left[c]:
                tie[c] = next(ties)
    assert rows_of(balance, seed, epoch).tolist() == expected
    assert [ids.tolist() for ids in balance.epoch(seed, epoch, 1)] == expected[1:]


def test_orders_are_those_of_earlier_versions():
    """A run that was begun goes on in the order that it began with."""
    labels = np.random.default_rng(0).integers(0, 7, 300) ** 2 // 6
    uniform = [*order.uniform_epoch(3, 2, 300, 32, drop_last=False), *order.uniform_epoch(3, 2, 300, 32)]
    both = (order.Balance(labels, 12, 4, repeat) for repeat in (False, True))
    balanced = [row for balance in both for epoch in (0, 4) for row in balance.epoch(1, epoch)]
    held = order.hold_out(labels, 0.3)
    for rows, known in ((uniform, "9bba0ffcf26a5294"), (balanced, "0208b3b37f34e123"), (held, "11ae1c2475f2571e")):
        content = np.concatenate(rows).astype("<i8").tobytes()
        assert hashlib.sha256(content).hexdigest()[:16] == known


def test_balanced_epochs_differ_by_seed_and_epoch_and_repeat_exactly():
    labels = np.arange(400) % 10
    first = rows_of(order.Balance(labels, 20, 4), 0, 0)
    assert (first == rows_of(order.Balance(labels, 20, 4), 0, 0)).all()
    for seed, epoch in ((1, 0), (0, 1)):
        assert (first == rows_of(order.Balance(labels, 20, 4), seed, epoch)).mean() < 0.05  # 1 in 400 by chance


def test_samples_left_out_of_one_balanced_epoch_come_in_another():
    labels = np.repeat([0, 1, 2], [5, 6, 7])
    seen = set()
    for epoch in range(30):
        seen |= set(rows_of(order.Balance(labels, 12, 4), 0, epoch).ravel().tolist())
    assert seen == set(range(18))


@settings(max_examples=150, deadline=None)
@given(balanced_cases(), st.booleans())
def test_every_sample_comes_within_the_stated_number_of_epochs(case, repeat):
    """From any epoch on, but for classes with fewer than K samples, unless these are taken again."""
    labels, p, k, seed, first = case
    balance = order.Balance(labels, p * k, k, repeat)
    sizes = np.bincount(labels)
    assert balance.left_out.tolist() == np.flatnonzero((sizes > 0) & (sizes < k) & (not repeat)).tolist()
    if not balance.num_batches:
        return
    seen = np.concatenate([rows_of(balance, seed, first + e).ravel() for e in range(balance.rounds)])
    missing = set(range(len(labels))) - set(seen.tolist())
    assert set(labels[list(missing)].tolist()) <= set(balance.left_out.tolist())
    for e in range(3):
        batches = rows_of(balance, seed, first + e)
        times = np.bincount(batches.ravel(), minlength=len(labels))
        assert (times[sizes[labels] >= k] <= 1).all()
        for batch in batches:
            classes, counts = np.unique(labels[batch], return_counts=True)
            assert (len(classes), set(counts.tolist())) == (p, {k})


def test_a_large_class_takes_turns_and_is_not_drawn_at_random():
    """A fresh draw each epoch would leave half of it unseen after thirty epochs."""
    labels = np.repeat(np.arange(5), [1000, 20, 20, 20, 20])
    balance = order.Balance(labels, 20, 4)
    assert (balance.num_batches, balance.rounds) == (5, 50)
    epochs = [rows_of(balance, 0, e) for e in range(50)]
    large = np.concatenate([e[labels[e] == 0] for e in epochs])
    assert sorted(large.tolist()) == list(range(1000)), "each once"
    assert [np.unique(e[labels[e] > 0]).size for e in epochs] == [80] * 50


def test_small_classes_are_taken_again_where_that_is_wanted():
    labels = np.repeat(np.arange(5), [8, 6, 3, 2, 1])
    assert order.Balance(labels, 8, 4).left_out.tolist() == [2, 3, 4]
    balance = order.Balance(labels, 8, 4, repeat=True)
    times = np.bincount(np.concatenate([rows_of(balance, 0, e).ravel() for e in range(balance.rounds)]), minlength=20)
    assert (times > 0).all()
    lone = rows_of(balance, 0, 0).ravel() == 19
    assert lone.sum() in (0, 4)


def test_classes_meet_in_balanced_batches_equally_often():
    labels, number = np.repeat(np.arange(6), 4), 900
    pairs = np.zeros((6, 6), int)
    for epoch in range(number):
        for batch in rows_of(order.Balance(labels, 8, 4), 3, epoch):
            a, b = np.unique(labels[batch])
            pairs[a, b] += 1
    met = pairs[np.triu_indices(6, 1)]
    assert met.sum() == 3 * number
    assert np.abs(met - number / 5).max() < 5 * np.sqrt(number / 5)


def test_classes_of_one_size_are_shuffled_each_on_its_own():
    labels, size = np.arange(400) % 2, 200
    batches = rows_of(order.Balance(labels, 8, 4), 0, 0)
    places = [np.concatenate([batch[labels[batch] == c] // 2 for batch in batches]) for c in (0, 1)]
    assert (places[0] == places[1]).sum() < 8  # 1 +- 1 for unrelated permutations
    assert abs(np.corrcoef(*places)[0, 1]) < 4.5 / np.sqrt(size)


@pytest.mark.parametrize(
    ("batch", "classes", "wanted", "k"),
    [(128, 200, None, 4), (128, 10, None, 16), (36, 10, None, 4), (128, 200, 2, 2), (30, 4, None, 10)],
)
def test_samples_per_class_is_the_least_that_fits(batch, classes, wanted, k):
    assert order.fit_samples_per_class(batch, classes, wanted) == k


@pytest.mark.parametrize(("batch", "classes", "wanted"), [(128, 200, 3), (128, 10, 4), (3, 10, None), (8, 10, 16)])
def test_samples_per_class_that_do_not_fit_are_refused(batch, classes, wanted, user_error):
    with user_error("data.samples_per_class", wanted or 4, f"global_batch_size {batch}", classes):
        order.fit_samples_per_class(batch, classes, wanted)


# held-out samples


@few
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any), st.floats(0, 0.99), st.randoms())
def test_hold_out_takes_its_fraction_of_every_class(sizes, fraction, rng):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rng.shuffle(labels)
    train, val = order.hold_out(labels, fraction)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(len(labels)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(val) > 0).all()
    for c, size in enumerate(sizes):
        assert abs((labels[val] == c).sum() - fraction * size) <= 0.5


def test_hold_out_depends_on_nothing_but_the_labels():
    labels = np.arange(100) % 4
    held = []
    for seed in (0, 1):
        np.random.seed(seed)
        random.seed(seed)
        torch.manual_seed(seed)
        held.append(order.hold_out(labels, 0.3)[1].tolist())
    assert held[0] == held[1]


def test_hold_out_is_spread_over_each_class_and_differs_between_classes():
    labels = np.repeat([0, 1], 1000)
    _, val = order.hold_out(labels, 0.2)
    a, b = val[val < 1000], val[val >= 1000] - 1000
    for places in (a, b):
        assert abs(places.mean() - 500) < 5 * 289 / np.sqrt(200)
    assert len(np.intersect1d(a, b)) < 75  # 40 +- 6 by chance


# parts of ranks


@few
@given(st.integers(0, 300), st.integers(1, 40))
def test_rank_parts_are_contiguous_cover_and_differ_by_at_most_one(size, world_size):
    batch = np.arange(size) * 3 + 1
    parts = [batch[order.rank_part(size, rank, world_size)] for rank in range(world_size)]
    assert np.concatenate(parts).tolist() == batch.tolist()
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)
    assert lengths == order.part_sizes(size, world_size)


def test_more_ranks_than_samples_leave_ranks_empty():
    assert order.part_sizes(2, 5) == [1, 1, 0, 0, 0]
    assert order.part_sizes(0, 3) == [0, 0, 0]


@pytest.mark.parametrize(("size", "expected"), [(None, [10]), (10, [10]), (4, [4, 4, 2]), (1, [1] * 10), (99, [10])])
def test_micro_batches_are_consecutive_and_whole(size, expected):
    batch = np.random.default_rng(0).permutation(10)
    parts = order.blocks(batch, size)
    assert [len(part) for part in parts] == expected
    assert np.concatenate(parts).tolist() == batch.tolist()
