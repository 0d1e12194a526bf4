"""TripletLoss against a loop over every triplet, pytorch-metric-learning, and finite differences."""

import math
import weakref
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner
from pytorch_metric_learning.reducers import AvgNonZeroReducer, MeanReducer
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dlops_dist.losses import TripletLoss
from dlops_dist.losses.mining import CHUNK_ELEMENTS, Classes, Nearness, mined

MININGS = ["batch-hard", "semi-hard", "all"]
AVERAGES = ["valid", "active"]
each_mining = pytest.mark.parametrize("mining", MININGS)
each_average = pytest.mark.parametrize("average", AVERAGES)
each_distance = pytest.mark.parametrize(
    ("normalize", "squared"), list(product([True, False], repeat=2)), ids=["unit", "unit-squared", "raw", "raw-squared"]
)


def batch(num=12, dim=4, num_classes=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(num, dim, generator=generator, dtype=torch.float64).to(dtype)
    return embeddings.requires_grad_(), torch.randint(num_classes, (num,), generator=generator)


def with_duplicates():
    """Every embedding twice, at coordinates that are not round, within a class and across classes."""
    embeddings, labels = batch(num=11, dim=32)
    return embeddings.detach().repeat(2, 1).requires_grad_(), torch.cat([labels, labels.roll(1)])


BATCHES = {
    "random": batch,
    "duplicates": with_duplicates,
    "one class": lambda: (batch()[0], torch.zeros(12, dtype=torch.int64)),
    "all labels differ": lambda: (batch()[0], torch.arange(12)),
    "a class of one": lambda: (batch(num=7)[0], torch.tensor([0, 0, 1, 0, 2, 2, 0])),
    "one sample": lambda: batch(num=1),
    "empty": lambda: batch(num=0),
}
each_batch = pytest.mark.parametrize("make_batch", BATCHES.values(), ids=BATCHES.keys())


def squared_distance(a, b):
    return math.fsum((u - v) ** 2 for u, v in zip(a, b, strict=True))


def loop_triplets(points, labels, mining):
    """(a, p, n) of a batch, anchor by anchor; of equal distances the lowest index."""
    for a, own in enumerate(labels):
        distance = [squared_distance(points[a], point) for point in points]
        positives = [i for i, label in enumerate(labels) if label == own and i != a]
        negatives = [i for i, label in enumerate(labels) if label != own]
        if not positives or not negatives:
            continue
        if mining == "batch-hard":
            yield a, max(positives, key=distance.__getitem__), min(negatives, key=distance.__getitem__)
        elif mining == "all":
            yield from ((a, p, n) for p in positives for n in negatives)
        else:
            for p in positives:
                farther = [n for n in negatives if distance[n] > distance[p]]
                farthest = max(negatives, key=distance.__getitem__)
                yield a, p, min(farther, key=distance.__getitem__) if farther else farthest


def loop_loss(embeddings, labels, loss):
    """(sum, count) of max(d(a, p) - d(a, n) + margin, 0) over the triplets of a batch."""
    points = embeddings.tolist()
    if loss.normalize:
        points = [[value / math.hypot(*point) for value in point] for point in points]
    losses = []
    for a, p, n in loop_triplets(points, labels.tolist(), loss.mining):
        near, far = squared_distance(points[a], points[p]), squared_distance(points[a], points[n])
        if not loss.squared:
            near, far = math.sqrt(near), math.sqrt(far)
        losses.append(max(near - far + loss.margin, 0.0))
    return math.fsum(losses), len(losses) if loss.average == "valid" else sum(value > 0 for value in losses)


def gradient_of(total, embeddings):
    (gradient,) = torch.autograd.grad(total, embeddings)
    return gradient


@each_mining
@each_distance
@each_average
@each_batch
def test_sum_count_and_mean_equal_the_loop(mining, normalize, squared, average, make_batch):
    embeddings, labels = make_batch()
    loss = TripletLoss(0.4, mining, normalize, squared, average)
    total, count = loop_loss(embeddings, labels, loss)
    terms = loss.terms(embeddings, labels)
    assert terms.sum.item() == pytest.approx(total, rel=1e-12, abs=1e-14)
    assert terms.count.item() == count
    assert loss(embeddings, labels).item() == pytest.approx(total / max(count, 1), rel=1e-12, abs=1e-14)


@each_mining
@given(
    points=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=8, max_size=8),
    labels=st.lists(st.integers(0, 2), min_size=8, max_size=8),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_sum_and_count_equal_the_loop_on_a_grid_full_of_equal_distances(mining, points, labels):
    embeddings, labels = torch.tensor(points, dtype=torch.float64), torch.tensor(labels)
    loss = TripletLoss(1.5, mining, normalize=False, average="active", squared=True)
    total, count = loop_loss(embeddings, labels, loss)
    terms = loss.terms(embeddings, labels)
    assert (terms.sum.item(), terms.count.item()) == (pytest.approx(total, rel=1e-12), count)


@each_mining
@each_distance
def test_gradient_equals_finite_differences(mining, normalize, squared):
    embeddings, labels = batch(num=9)
    loss = TripletLoss(0.4, mining, normalize, squared)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), (embeddings,))
    assert torch.autograd.gradcheck(lambda x: loss.terms(x, labels, slice(2, 5)).sum, (embeddings,))


@each_distance
def test_gradient_of_given_triplets_equals_finite_differences(normalize, squared):
    triplets = tuple(batch(num=5, seed=seed)[0] for seed in range(3))
    assert torch.autograd.gradcheck(TripletLoss(0.4, "all", normalize, squared).from_triplets, triplets)


@each_mining
@each_average
@each_batch
@pytest.mark.parametrize("cuts", [[0.5], [0.1, 0.1, 0.7], [0.0, 0.9], [i / 8 for i in range(1, 8)]], ids=len)
def test_terms_over_a_partition_of_the_anchors_add_up(mining, average, make_batch, cuts):
    embeddings, labels = make_batch()
    loss = TripletLoss(0.4, mining, average=average)
    whole = loss.terms(embeddings, labels)
    bounds = [0, *(int(cut * len(labels)) for cut in cuts), len(labels)]
    parts = [loss.terms(embeddings, labels, slice(*ends)) for ends in pairwise(bounds)]
    assert_close(sum(part.sum for part in parts), whole.sum, rtol=1e-12, atol=1e-14)
    assert sum(part.count.item() for part in parts) == whole.count.item()
    gradient_of_parts = sum(gradient_of(part.sum, embeddings) for part in parts)
    assert_close(gradient_of_parts, gradient_of(whole.sum, embeddings), rtol=1e-12, atol=1e-13)


@each_mining
@pytest.mark.parametrize("kind", ["one class", "all labels differ", "one sample", "empty"])
def test_a_batch_without_triplets_costs_nothing_and_pushes_nothing(mining, kind):
    embeddings, labels = BATCHES[kind]()
    loss = TripletLoss(mining=mining)
    assert loss.terms(embeddings, labels).count.item() == 0
    value = loss(embeddings, labels)
    assert value.item() == 0
    assert torch.equal(gradient_of(value, embeddings), torch.zeros_like(embeddings))


@each_mining
@pytest.mark.parametrize("anchors", [slice(0, 0), slice(5, 5), slice(12, 12)])
def test_a_share_without_anchors_still_takes_part_in_the_backward_pass(mining, anchors):
    embeddings, labels = batch()
    terms = TripletLoss(mining=mining).terms(embeddings, labels, anchors)
    assert (terms.sum.item(), terms.count.item()) == (0, 0)
    assert torch.equal(gradient_of(terms.sum, embeddings), torch.zeros_like(embeddings))


@each_mining
@each_distance
@pytest.mark.parametrize("place", [0.0, 0.3, 1000.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_collapsed_batch_costs_the_margin_and_its_gradient_is_finite(mining, normalize, squared, place, dtype):
    embeddings = torch.full((9, 5), place, dtype=dtype, requires_grad=True)
    loss = TripletLoss(0.4, mining, normalize, squared)(embeddings, torch.arange(9) % 3)
    assert loss.item() == pytest.approx(0.4, rel=1e-6)
    assert gradient_of(loss, embeddings).isfinite().all()


@each_mining
@each_distance
def test_a_pair_that_coincides_has_a_finite_gradient(mining, normalize, squared):
    embeddings, labels = with_duplicates()
    total = TripletLoss(0.4, mining, normalize, squared).terms(embeddings, labels).sum
    gradient = gradient_of(total, embeddings)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def gradient_of_loop(embeddings, labels, loss):
    """Gradient of the sum over the loop's triplets, mined in float64 on the given (raw) embeddings."""
    x = embeddings.detach().double().requires_grad_()
    triplets = torch.tensor(list(loop_triplets(x.tolist(), labels.tolist(), loss.mining)))
    total = sum(
        (((x[a] - x[p]).norm() - (x[a] - x[n]).norm() + loss.margin).relu() for a, p, n in triplets), x.sum() * 0
    )
    return gradient_of(total, x)


@pytest.mark.parametrize("mining", ["batch-hard", "semi-hard"])
@pytest.mark.parametrize(("mean", "spread"), [(1.0, 1.0), (100.0, 1e-2), (1000.0, 1e-1), (-30.0, 1e-4)])
def test_float32_picks_are_those_of_float64_however_far_from_the_origin(mining, mean, spread):
    generator = torch.Generator().manual_seed(3)
    embeddings = (mean + spread * torch.randn(48, 8, generator=generator)).requires_grad_()
    labels = torch.arange(48) % 6
    loss = TripletLoss(20 * spread, mining, normalize=False)  # no hinge closes: each pick shows in the gradient
    terms = loss.terms(embeddings, labels)
    assert terms.count.item() == len(list(loop_triplets(embeddings.tolist(), labels.tolist(), mining)))
    expected = gradient_of_loop(embeddings, labels, loss)
    gradient = gradient_of(terms.sum, embeddings)
    assert_close(gradient.double(), expected, rtol=0, atol=1e-4)  # a wrong pick changes it by about 1


@pytest.mark.parametrize("mining", ["batch-hard", "semi-hard"])
def test_float32_picks_of_nearly_equal_directions_are_those_of_float64(mining):
    generator = torch.Generator().manual_seed(4)
    embeddings, labels = 1 + 1e-3 * torch.randn(48, 8, generator=generator), torch.arange(48) % 6
    unit = F.normalize(embeddings).requires_grad_()
    loss = TripletLoss(0.1, mining, normalize=False)
    assert_close(
        gradient_of(loss.terms(unit, labels).sum, unit).double(),
        gradient_of_loop(unit, labels, loss),
        rtol=0,
        atol=1e-3,
    )
    normalized = TripletLoss(0.1, mining).terms(embeddings, labels)
    assert_close(normalized.sum, loss.terms(unit, labels).sum, rtol=1e-4, atol=0)


@each_mining
@each_average
@pytest.mark.parametrize("elements", [1, 30, 40])
def test_the_size_of_the_chunks_does_not_matter(mining, average, elements, monkeypatch):
    embeddings, labels = batch(num=13)
    loss = TripletLoss(0.4, mining, average=average)
    whole = loss.terms(embeddings, labels, slice(1, None))
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", elements)
    chunked = loss.terms(embeddings, labels, slice(1, None))
    assert_close(chunked.sum, whole.sum, rtol=1e-13, atol=0)
    assert chunked.count.item() == whole.count.item() > 0
    assert_close(gradient_of(chunked.sum, embeddings), gradient_of(whole.sum, embeddings), rtol=0, atol=1e-13)


class LargestTensor(TorchDispatchMode):
    """Notes the number of values of the largest tensor that any operation returns, forward or backward."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


class Kept:
    def __init__(self, tensor, kept):
        self.tensor = tensor
        kept.add(self)


@each_mining
@pytest.mark.parametrize("num_classes", [2, 32])
def test_memory_stays_below_n_squared(mining, num_classes, monkeypatch):
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 4 * 128)
    embeddings, labels = batch(num=128)[0], torch.arange(128) % num_classes
    kept = weakref.WeakSet()  # what is saved for the backward pass, and still alive when the forward pass is over
    with torch.autograd.graph.saved_tensors_hooks(lambda x: Kept(x, kept), lambda saved: saved.tensor):
        loss = TripletLoss(mining=mining)(embeddings.requires_grad_(), labels)
    with LargestTensor() as largest:
        TripletLoss(mining=mining)(embeddings, labels).backward()
    assert loss > 0
    assert 128 * 4 <= largest.numel < 128 * 128
    assert sum(saved.tensor.numel() for saved in kept) < 128 * 128


@each_mining
@each_average
def test_a_small_margin_between_long_distances_keeps_its_digits_in_float32(mining, average):
    corners = 10 * torch.eye(69)  # of a simplex: every distance is sqrt(200)
    loss = TripletLoss(1e-3, mining, normalize=False, average=average)
    expected = pytest.approx(1e-3, rel=1e-6 if mining == "all" else 1e-3)  # the others add the margin in float32
    assert loss(corners, torch.arange(69) % 3).item() == expected


@each_mining
@pytest.mark.parametrize(("average", "count"), [("valid", 2), ("active", 1)])
def test_average_divides_by_valid_or_by_active_triplets(mining, average, count):
    # the triplet of 0 is satisfied (1 - 3 + 1.5 < 0), that of 1 is not (1 - 2 + 1.5 = 0.5), 3 has no positive
    embeddings, labels = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 0, 1])
    loss = TripletLoss(1.5, mining, normalize=False, average=average)
    terms = loss.terms(embeddings, labels)
    assert (terms.sum.item(), terms.count.item()) == (0.5, count)
    assert loss(embeddings, labels).item() == 0.5 / count


@each_average
@each_distance
def test_loss_of_given_triplets_equals_the_loop(average, normalize, squared):
    triplets = [batch(num=9, seed=seed)[0] for seed in range(3)]
    losses = []
    for rows in zip(*(x.tolist() for x in triplets), strict=True):
        a, p, n = ([v / math.hypot(*row) for v in row] if normalize else row for row in rows)
        near, far = squared_distance(a, p), squared_distance(a, n)
        losses.append(max(near - far + 0.4 if squared else math.sqrt(near) - math.sqrt(far) + 0.4, 0.0))
    number = len(losses) if average == "valid" else sum(value > 0 for value in losses)
    assert 0 < sum(value > 0 for value in losses) < len(losses)
    loss = TripletLoss(0.4, normalize=normalize, squared=squared, average=average)
    assert loss.from_triplets(*triplets).item() == pytest.approx(math.fsum(losses) / number, rel=1e-12)


def test_no_given_triplets_cost_nothing():
    assert TripletLoss().from_triplets(*torch.zeros(3, 0, 4)).item() == 0


@each_mining
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_losses_are_computed_in_float32_under_autocast(mining, dtype):
    embeddings, labels = batch(num=40, dim=16, dtype=dtype)
    loss = TripletLoss(0.4, mining)
    expected = loss(embeddings.float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss(embeddings, labels)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, expected)
    assert_close(gradient_of(mixed, embeddings), gradient_of(expected, embeddings), rtol=0, atol=0)


def test_given_triplets_are_computed_in_float32_under_autocast():
    triplets = [batch(num=9, seed=seed, dtype=torch.bfloat16)[0] for seed in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = TripletLoss().from_triplets(*triplets)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, TripletLoss().from_triplets(*(x.float() for x in triplets)))


def rows_with_gradient(embeddings, labels, loss, anchors):
    gradient = gradient_of(loss.terms(embeddings, labels, anchors).sum, embeddings)
    return gradient.abs().sum(dim=1).nonzero().flatten().tolist()


TIES = {  # anchor 0 at the origin, of class 0: (x, y, class) of the others, and the rows that its triplets move
    "batch-hard": (
        [(2, 0, 0), (0, 2, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0), (3, 0, 1), (0, 1, 0)],
        [0, 1, 3],
    ),
    "semi-hard, of the farther the nearest": (
        [(1, 0, 0), (0, 3, 1), (3, 0, 1), (0, 0, 1), (-3, 0, 1), (0, -3, 1), (5, 0, 1)],
        [0, 1, 2],
    ),
    "semi-hard, equally far is not farther": (
        [(2, 0, 0), (0, 2, 1), (-2, 0, 1), (0, 3, 1), (1, 0, 1), (0, -2, 1), (3, 0, 1)],
        [0, 1, 4],
    ),
    "semi-hard, none farther": (
        [(5, 0, 0), (0, 1, 1), (0, 3, 1), (3, 0, 1), (-3, 0, 1), (1, 1, 1), (1, 0, 1)],
        [0, 1, 3],
    ),
}


@pytest.mark.parametrize("case", TIES)
def test_of_equal_distances_the_lowest_index_is_picked(case):
    others, picked = TIES[case]
    samples = torch.tensor([(0, 0, 0), *others], dtype=torch.float64)  # 8 integers: mean and distances are exact
    embeddings, labels = samples[:, :2].clone().requires_grad_(), samples[:, 2].long()
    loss = TripletLoss(100.0, case.partition(",")[0], normalize=False)
    assert rows_with_gradient(embeddings, labels, loss, slice(0, 1)) == picked


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("negative", range(4, 11))
def test_of_coinciding_negatives_the_lowest_index_is_picked(dtype, negative):
    embeddings = with_duplicates()[0].detach().to(dtype).requires_grad_()
    labels = torch.zeros(22, dtype=torch.int64)
    labels[negative] = labels[negative + 11] = 1
    touched = rows_with_gradient(embeddings, labels, TripletLoss(100.0), slice(0, 4))
    assert negative in touched
    assert negative + 11 not in touched


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("average", "reducer"), [("valid", MeanReducer()), ("active", AvgNonZeroReducer())])
@pytest.mark.parametrize("mining", ["batch-hard", "all"])
def test_loss_and_gradient_equal_pytorch_metric_learning(normalize, average, reducer, mining):
    embeddings, labels = batch(num=20, dim=6, num_classes=4)
    distance = LpDistance(normalize_embeddings=normalize)
    mined = BatchHardMiner(distance=distance)(embeddings, labels) if mining == "batch-hard" else None
    theirs = TripletMarginLoss(0.4, distance=distance, reducer=reducer)(embeddings, labels, mined)
    ours = TripletLoss(0.4, mining, normalize, average=average)(embeddings, labels)
    assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert_close(gradient_of(ours, embeddings), gradient_of(theirs, embeddings), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("field", "value"),
    [("margin", -0.1), ("margin", math.nan), ("mining", "hard"), ("mining", ""), ("average", "mean")],
)
def test_an_argument_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        TripletLoss(**{field: value})


def naive_loss(x, labels, mining):
    """Sum of a batch's hinges by torch's own max and min, which pass NaN on."""
    distance = (x[:, None] - x[None]).square().sum(dim=2).sqrt()
    total = x.new_zeros(())
    for a in range(len(x)):
        positive = (labels == labels[a]) & (torch.arange(len(x)) != a)
        d_ap, d_an = distance[a][positive], distance[a][labels != labels[a]]
        if not (len(d_ap) and len(d_an)):
            continue
        if mining == "batch-hard":
            hinges = d_ap.max() - d_an.min()
        elif mining == "all":
            hinges = d_ap[:, None] - d_an
        else:
            farther = d_an.expand(len(d_ap), -1).masked_fill(d_an <= d_ap[:, None], torch.inf).amin(dim=1)
            hinges = d_ap - torch.where(farther.isinf(), d_an.max(), farther)
        total = total + (hinges + 0.2).clamp(min=0).sum()
    return total


@each_mining
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 6], ids=["in a class", "a class of one"])
def test_what_is_not_finite_is_passed_on_in_value_and_gradient(mining, normalize, bad, where):
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = TripletLoss(0.2, mining, normalize=normalize)
    finite = x.clone().requires_grad_()
    wanted = naive_loss(F.normalize(finite, dim=1) if normalize else finite, labels, mining)
    assert loss.terms(finite, labels).sum.item() == pytest.approx(wanted.item(), rel=1e-12)

    x[where, 0] = bad
    x.requires_grad_()
    if math.isnan(bad):
        assert naive_loss(x, labels, mining).isnan()
    value = loss(x, labels)
    assert value.isnan()
    assert gradient_of(value, x).isnan().all()
    parts = [loss.terms(x, labels, slice(first, first + 1)).sum for first in range(7)]
    assert torch.stack(parts).isnan().all(), "every rank knows it"


@each_mining
def test_a_triplet_that_is_not_finite_is_passed_on(mining):
    x = torch.randn(3, 4, 2, dtype=torch.float64)
    for which in range(3):
        rows = x.clone()
        rows[which, 1, 0] = math.nan
        rows.requires_grad_()
        value = TripletLoss(0.2, mining, normalize=False).from_triplets(*rows)
        assert value.isnan()
        assert gradient_of(value, rows).isnan().any()


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-9, 1e-3])
def test_the_gradient_of_a_short_embedding_is_bounded(length):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    x[2] *= length / x[2].norm()
    x.requires_grad_()
    gradient = gradient_of(TripletLoss(0.5)(x, torch.arange(6) % 2), x)
    assert gradient.isfinite().all()
    assert gradient.abs().max() <= 1e6


def tight_clusters(noise, per_class, num_classes=8, dim=32):
    """Unit centres far apart, with so little noise that products of float32 lose it."""
    generator = torch.Generator().manual_seed(0)
    centers = F.normalize(torch.randn(num_classes, dim, generator=generator, dtype=torch.float64), dim=1)
    x = centers.repeat_interleave(per_class, 0)
    x = x + noise * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x.float(), torch.arange(num_classes).repeat_interleave(per_class)


@pytest.mark.parametrize("per_class", [4, 30, 64])
@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4])
def test_float32_mines_the_farthest_positive_of_a_tight_class_for_any_share(noise, per_class):
    x, labels = tight_clusters(noise, per_class)
    loss = TripletLoss(2.0, normalize=False)  # no hinge closes: each pick shows in the gradient

    def gradient(dtype, shares=1):
        own = x.to(dtype, copy=True).requires_grad_()
        ends = [round(len(x) * i / shares) for i in range(shares + 1)]
        return gradient_of(sum(loss.terms(own, labels, slice(*ends)).sum for ends in pairwise(ends)), own).double()

    exact = gradient(torch.float64)
    for shares in (1, 3, 5, 7):
        assert (gradient(torch.float32, shares) - exact).norm() <= 1e-6 * exact.norm(), shares


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("per_class", [3, 70])
def test_what_a_cpu_does_not_compare_exactly_comes_out_as_what_a_gpu_does(spread, per_class, monkeypatch):
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(210) % (210 // per_class)
    centers = torch.randn(210, 24, generator=generator)
    embeddings = centers[labels] + spread * torch.randn(210, 24, generator=generator)
    compared = []
    exact = Nearness.exact
    monkeypatch.setattr(Nearness, "exact", lambda self, rows, _: compared.append(len(rows)) or exact(self, rows, _))
    triplets = []
    for on_gpu in (False, True):
        monkeypatch.setattr("dlops_dist.losses.mining.on_gpu", lambda x, on_gpu=on_gpu: on_gpu)
        classes = Classes(labels, per_class)
        (found,) = mined(Nearness(embeddings), classes, classes.mates(0, 210), "batch-hard")
        triplets.append(found)
    assert torch.equal(triplets[0].others, triplets[1].others)
    assert compared[2:] == [210, 210]
    if spread == 1.0:
        assert sum(compared[:2]) < 30, "far apart, few are compared"
