"""Metrics against loops over samples, classes and pairs."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from dlops_dist.metrics import (
    Judged,
    Points,
    add_confusion,
    centers_of,
    class_hits,
    map_at_r,
    nearest_center_correct,
    rank_of_label,
    recall_at,
    retrieved,
    top_k,
    unit_length,
)

NAN = math.nan


def samples(num=24, dim=5, num_classes=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num, dim, generator=generator, dtype=torch.float64)
    return values.to(dtype), torch.randint(num_classes, (num,), generator=generator)


def nearest(point, candidates):
    """Index of the candidate (index, point) that is nearest, the first of equal ones."""
    return min(candidates, key=lambda candidate: math.dist(point, candidate[1]))[0]


@given(
    rows=st.lists(st.lists(st.integers(-2, 2), min_size=5, max_size=5), min_size=1, max_size=6),
    labels=st.lists(st.integers(0, 4), min_size=6, max_size=6),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_rank_is_the_place_in_a_stable_descending_sort(rows, labels):
    labels = labels[: len(rows)]
    expected = [
        sorted(range(5), key=lambda c, row=row: (-row[c], c)).index(y) for row, y in zip(rows, labels, strict=True)
    ]
    assert rank_of_label(torch.tensor(rows, dtype=torch.float32), torch.tensor(labels)).tolist() == expected


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_below_k_is_a_hit_among_torchs_top_k(k, dtype):
    logits, _ = samples(num=50, dim=20, dtype=dtype)
    labels = torch.arange(50) % 20
    hits = (logits.topk(k, dim=1).indices == labels[:, None]).any(dim=1)
    assert torch.equal(rank_of_label(logits, labels) < k, hits)
    assert 0 < hits.sum() < 50


@given(
    rows=st.lists(st.lists(st.sampled_from([-1.0, 0.0, 1.0, NAN]), min_size=4, max_size=4), min_size=1, max_size=9),
    labels=st.lists(st.integers(0, 3), min_size=9, max_size=9),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_confusion_counts_the_first_largest_logit_of_each_row_without_a_nan(rows, labels):
    labels = labels[: len(rows)]
    expected = [[0] * 4 for _ in range(4)]
    for row, label in zip(rows, labels, strict=True):
        if not any(map(math.isnan, row)):
            expected[label][row.index(max(row))] += 1
    logits, labels, counts = torch.tensor(rows), torch.tensor(labels), torch.zeros(4, 4, dtype=torch.float64)
    add_confusion(counts, logits[:3], labels[:3])
    add_confusion(counts, logits[3:], labels[3:])
    assert counts.tolist() == expected
    assert class_hits(logits, labels).tolist() == counts.diagonal().tolist()


def test_a_row_with_a_nan_is_a_miss_for_every_k():
    logits = torch.tensor([[0.0, 9.0, 1.0], [NAN, 9.0, 1.0], [0.0, NAN, 1.0], [NAN, NAN, NAN]])
    assert rank_of_label(logits, torch.tensor([1, 1, 1, 0])).tolist() == [0, 3, 3, 3]


def test_infinite_logits_are_ranked():
    logits = torch.tensor([[-math.inf, 0.0, math.inf]]).expand(3, 3)
    assert rank_of_label(logits, torch.tensor([0, 1, 2])).tolist() == [2, 1, 0]


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_center_equals_the_loop(offset, dtype):
    embeddings, labels = samples(num=60, dtype=dtype)
    centers, _ = samples(num=4, seed=1, dtype=dtype)
    embeddings, centers = embeddings + offset, centers + offset
    expected = [
        nearest(x, enumerate(centers.tolist())) == y for x, y in zip(embeddings.tolist(), labels.tolist(), strict=True)
    ]
    assert nearest_center_correct(embeddings, labels, centers_of(centers)).tolist() == expected
    assert 0 < sum(expected) < 60


@pytest.mark.parametrize("unseen", [0, 2, 3])
def test_a_class_never_seen_is_nearest_to_nothing(unseen):
    embeddings, labels = samples(num=60)
    centers, _ = samples(num=4, seed=1)
    centers[unseen] = NAN
    seen = [(c, center) for c, center in enumerate(centers.tolist()) if c != unseen]
    expected = [nearest(x, seen) == y for x, y in zip(embeddings.tolist(), labels.tolist(), strict=True)]
    assert nearest_center_correct(embeddings, labels, centers_of(centers)).tolist() == expected
    assert not any(correct for correct, y in zip(expected, labels.tolist(), strict=True) if y == unseen)


def test_a_centre_with_one_nan_is_nearest_to_nothing():
    centers = torch.tensor([[0.0, NAN], [5.0, 5.0]])
    assert nearest_center_correct(torch.zeros(2, 2), torch.tensor([0, 1]), centers_of(centers)).tolist() == [
        False,
        True,
    ]


def test_without_any_class_seen_nothing_is_correct():
    embeddings, labels = samples()
    assert not nearest_center_correct(
        embeddings, labels, centers_of(torch.full((4, 5), NAN, dtype=torch.float64))
    ).any()


def judged(embeddings, labels, place=slice(None), logits=None):
    logits = embeddings.new_empty(len(labels[place]), 0) if logits is None else logits
    largest = int(labels.bincount().max())
    return Judged(embeddings[place], labels[place], logits, embeddings.new_empty(0), embeddings, labels, place, largest)


def nearest_has_label(embeddings, labels, place=slice(None)):
    return retrieved(judged(embeddings, labels, place), 1)[:, 0]


def loop_recall(embeddings, labels):
    points = embeddings.tolist()
    hits = []
    for i, point in enumerate(points):
        found = nearest(point, [(j, other) for j, other in enumerate(points) if j != i])
        hits.append(bool(labels[found] == labels[i]))
    return hits


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recall_equals_the_loop(offset, dtype):
    embeddings, labels = samples(num=60, dim=3, dtype=dtype)
    embeddings += offset
    expected = loop_recall(embeddings, labels)
    assert nearest_has_label(embeddings, labels).tolist() == expected
    assert 0 < sum(expected) < 60


@pytest.mark.parametrize("noise", [1e-3, 1e-4, 1e-5])
def test_recall_in_tight_clusters_of_several_labels_is_that_of_float64(noise):
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(7, 16, generator=generator, dtype=torch.float64)
    embeddings = (centers.repeat(30, 1) + noise * torch.randn(210, 16, generator=generator)).float()
    labels = torch.randint(3, (210,), generator=generator)
    assert nearest_has_label(embeddings, labels).tolist() == loop_recall(embeddings.double(), labels)


def test_of_equally_near_samples_the_first_counts():
    embeddings = torch.tensor([[0.0], [1.0], [-1.0], [1.0]])
    for labels, hits in (([0, 0, 1, 1], [True, False, False, False]), ([0, 1, 0, 0], [False, False, True, False])):
        assert nearest_has_label(embeddings, torch.tensor(labels)).tolist() == hits


@pytest.mark.parametrize("cuts", [[0, 24], [0, 10, 10, 24], [0, 1, 23, 24]])
def test_recall_of_blocks_of_queries_is_that_of_all(cuts):
    embeddings, labels = samples()
    blocks = [nearest_has_label(embeddings, labels, slice(*ends)) for ends in pairwise(cuts)]
    assert torch.cat(blocks).tolist() == loop_recall(embeddings, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nearest_other_of_a_duplicate_is_its_twin(dtype):
    embeddings, _ = samples(num=11, dim=32, dtype=dtype)
    first = torch.arange(11) % 4
    second = torch.where(torch.arange(11) < 6, first, first + 1)
    hits = nearest_has_label(embeddings.repeat(2, 1), torch.cat([first, second]))
    assert hits.tolist() == ([True] * 6 + [False] * 5) * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_unit_length_keeps_directions_and_has_length_1(dtype):
    values, _ = samples(dtype=dtype)
    scaled = unit_length(values)
    assert scaled.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(scaled.norm(dim=1), torch.ones(24, dtype=scaled.dtype))
    assert_close(F.cosine_similarity(scaled, values.to(scaled.dtype)), torch.ones(24, dtype=scaled.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_points_that_are_prepared_once_are_as_far_as_those_prepared_for_each_metric(dtype):
    embeddings, labels = samples(num=300, dim=8, num_classes=9, dtype=dtype)
    points, parts = Points(embeddings), (slice(0, 7), slice(7, 299), slice(299, 300))
    for metric in (recall_at(1), recall_at(9), map_at_r()):
        for part in parts:
            own = judged(embeddings, labels, part)
            assert torch.equal(metric(own._replace(points=points)), metric(own))


def neighbours(embeddings, i):
    """All others, the nearest first, of equal ones the first."""
    points = embeddings.tolist()
    return sorted((j for j in range(len(points)) if j != i), key=lambda j: (math.dist(points[i], points[j]), j))


@pytest.mark.parametrize("k", [1, 2, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recall_at_k_equals_the_loop(k, dtype):
    embeddings, labels = samples(num=40, dim=3, num_classes=9, dtype=dtype)
    expected = [any(labels[j] == labels[i] for j in neighbours(embeddings, i)[:k]) for i in range(40)]
    found = [recall_at(k)(judged(embeddings, labels, part)).tolist() for part in (slice(0, 7), slice(7, 40))]
    assert [*found[0], *found[1]] == expected
    assert sum(expected) > 0


@pytest.mark.parametrize("num_classes", [2, 9, 30])
def test_map_at_r_equals_the_loop(num_classes):
    embeddings, labels = samples(num=40, dim=3, num_classes=num_classes)
    expected = []
    for i in range(40):
        r = sum(labels[j] == labels[i] for j in range(40)) - 1
        same = [bool(labels[j] == labels[i]) for j in neighbours(embeddings, i)[:r]]
        precision = [same[j] * sum(same[: j + 1]) / (j + 1) for j in range(int(r))]
        expected.append(sum(precision) / r if r else 0.0)
    found = torch.cat([map_at_r()(judged(embeddings, labels, part)) for part in (slice(0, 11), slice(11, 40))])
    assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_retrieval_finds_nothing_among_embeddings_that_are_nan():
    embeddings, labels = torch.full((6, 2), NAN), torch.zeros(6, dtype=torch.int64)
    assert not recall_at(3)(judged(embeddings, labels)).any()
    assert not map_at_r()(judged(embeddings, labels)).any()


def test_top_k_counts_those_whose_label_is_among_the_largest():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    labels = torch.tensor([1, 0])
    assert top_k(2)(judged(logits, labels, logits=logits)).tolist() == [True, False]
