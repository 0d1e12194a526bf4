"""Random numbers keyed by sample: SplitMix64 in Python integers as oracle, and their statistics."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlops_dist.data.draws import uniform
from dlops_dist.data.keys import key

MASK = 2**64 - 1
few = settings(max_examples=60, deadline=None)
draw_keys = st.one_of(st.sampled_from([0, 1, 2**63 - 1, 2**63, MASK]), st.integers(0, MASK))
ids_lists = st.lists(st.one_of(st.integers(0, 2**40), st.integers(0, 300)), min_size=1, max_size=8)


class SplitMix64:
    """Steele, Lea & Flood 2014, figure 14."""

    def __init__(self, state: int) -> None:
        self.state = state

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        z = self.state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)


def expected(draw_key: int, sample: int, num_draws: int) -> list[float]:
    """The sample's own generator is seeded by key + id, mixed once; the top 24 bits of each output are drawn."""
    own_seed = SplitMix64((draw_key + sample - 0x9E3779B97F4A7C15) % 2**64).next()
    generator = SplitMix64(own_seed)
    return [(generator.next() >> 40) / 2**24 for _ in range(num_draws)]


@few
@given(draw_keys, ids_lists, st.integers(1, 5))
def test_uniform_equals_splitmix64_in_python_integers(draw_key, ids, num_draws):
    drawn = uniform(draw_key, torch.tensor(ids), num_draws)
    assert drawn.dtype == torch.float32
    assert drawn.tolist() == [expected(draw_key, i, num_draws) for i in ids]


@few
@given(draw_keys, ids_lists, st.randoms())
def test_a_sample_draws_the_same_in_any_batch(draw_key, ids, rng):
    alone = {i: uniform(draw_key, torch.tensor([i]), 2)[0].tolist() for i in ids}
    rng.shuffle(ids)
    together = uniform(draw_key, torch.tensor(ids), 3)
    assert [row[:2] for row in together.tolist()] == [alone[i] for i in ids]


def test_an_empty_part_draws_nothing():
    assert uniform(1, torch.empty(0, dtype=torch.int64), 3).shape == (0, 3)


@pytest.mark.parametrize("purpose", ["crop", "flip"])
@pytest.mark.parametrize("first_id", [0, 2**40 - 40_000])
def test_draws_are_uniform(purpose, first_id):
    n = 40_000
    drawn = uniform(key(5, 3, purpose), torch.arange(first_id, first_id + n), 3)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    for column in drawn.double().T.numpy():
        distance = np.abs(np.sort(column) - (np.arange(n) + 0.5) / n).max()
        assert distance < 1.95 / np.sqrt(n)  # Kolmogorov-Smirnov, p = 0.001


def test_draws_do_not_depend_on_each_other():
    n = 40_000
    ids = torch.arange(n)
    a = uniform(key(0, 0, "crop"), ids, 3).double().numpy()
    next_epoch = uniform(key(0, 1, "crop"), ids, 1).double().numpy()[:, 0]
    flip = uniform(key(0, 0, "flip"), ids, 1).double().numpy()[:, 0]
    pairs = {
        "two draws of a sample": (a[:, 0], a[:, 1]),
        "draws one and three": (a[:, 0], a[:, 2]),
        "neighbouring ids": (a[1:, 0], a[:-1, 0]),
        "next id's first and this one's second": (a[1:, 0], a[:-1, 1]),
        "two epochs": (a[:, 0], next_epoch),
        "two purposes": (a[:, 0], flip),
        "the id itself": (a[:, 0], np.arange(n)),
    }
    for name, (x, y) in pairs.items():
        assert abs(np.corrcoef(x, y)[0, 1]) < 4.5 / np.sqrt(n), name
