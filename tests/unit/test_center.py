"""CenterLoss: its loss and the update of its centres, against loops of Wen et al. 2016, eq. 2 and 4."""

import math

import pytest
import torch
from torch.testing import assert_close

from dlops_dist.losses import CenterLoss
from dlops_dist.losses.center import add_rows

NUM_CLASSES, DIM = 6, 3
UNSEEN = [2, 5]


def batch(num=11, dtype=torch.float64, seed=0):
    """Embeddings and labels; the classes UNSEEN have no sample."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(num, DIM, generator=generator, dtype=torch.float64).to(dtype)
    seen = torch.tensor([c for c in range(NUM_CLASSES) if c not in UNSEEN])
    return embeddings.requires_grad_(), seen[torch.randint(len(seen), (num,), generator=generator)]


def center_loss(alpha=0.5, dtype=torch.float64):
    """A loss whose centres have moved off zero."""
    loss = CenterLoss(NUM_CLASSES, DIM, alpha).to(dtype)
    loss.centers.copy_(torch.randn(NUM_CLASSES, DIM, generator=torch.Generator().manual_seed(1), dtype=dtype))
    return loss


def loop_update(centers, embeddings, labels, alpha):
    """c_j <- c_j - alpha * sum_{i: y_i = j} (c_j - x_i) / (1 + n_j), class by class, value by value."""
    moved = []
    for j, center in enumerate(centers.tolist()):
        own = [x for x, y in zip(embeddings.tolist(), labels.tolist(), strict=True) if y == j]
        moved.append([c - alpha * math.fsum(c - x[d] for x in own) / (1 + len(own)) for d, c in enumerate(center)])
    return torch.tensor(moved, dtype=torch.float64)


def test_loss_and_gradient_equal_the_loop():
    embeddings, labels = batch()
    loss = center_loss()
    total, gradient = 0.0, []
    for x, y in zip(embeddings.tolist(), labels.tolist(), strict=True):
        difference = [value - c for value, c in zip(x, loss.centers[y].tolist(), strict=True)]
        total += 0.5 * math.fsum(d * d for d in difference)
        gradient.append([d / len(labels) for d in difference])

    terms = loss.terms(embeddings, labels)
    assert terms.sum.item() == pytest.approx(total, rel=1e-13)
    assert terms.count == len(labels)
    value = loss(embeddings, labels)
    assert value.item() == pytest.approx(total / len(labels), rel=1e-13)
    value.backward()
    assert_close(embeddings.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-13, atol=0)


def test_gradient_equals_finite_differences():
    embeddings, labels = batch()
    loss = center_loss()
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), (embeddings,))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_update_equals_the_loop_step_by_step(alpha, dtype, rtol):
    loss = center_loss(alpha, dtype)
    for seed in range(4):
        embeddings, labels = batch(dtype=dtype, seed=seed)
        expected = loop_update(loss.centers, embeddings, labels, alpha)
        loss.update(loss.sums(embeddings, labels))
        assert_close(loss.centers.double(), expected, rtol=0, atol=rtol * expected.norm().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_whole_batch_moves_its_own_classes_to_the_bits_of_a_move_of_all(dtype):
    ours, whole = center_loss(dtype=dtype), center_loss(dtype=dtype)
    for seed, number in enumerate((11, 1, 0, 40)):
        embeddings, labels = batch(number, dtype, seed)
        expected = loop_update(whole.centers, embeddings, labels, whole.alpha)
        ours.move(embeddings.detach(), labels)
        whole.update(whole.sums(embeddings, labels))
        assert torch.equal(ours.centers, whole.centers)
        assert_close(ours.centers.double(), expected, rtol=0, atol=1e-5 * expected.norm().item())


def test_the_spread_of_many_centres_is_that_of_all_at_once():
    loss = CenterLoss(20_000, 3)
    loss.centers.normal_()
    differences = loss.centers - loss.centers.mean(dim=0)
    assert loss.spread() == differences.square().sum(dim=1).mean().sqrt()


def test_with_alpha_1_a_lone_sample_draws_its_centre_half_way():
    loss = CenterLoss(2, 1, alpha=1.0)
    loss.update(loss.sums(torch.tensor([[8.0]]), torch.tensor([1])))
    assert loss.centers.tolist() == [[0.0], [4.0]]


def test_classes_without_samples_keep_their_bits():
    loss = center_loss(dtype=torch.float32)
    before = loss.centers.clone()
    embeddings, labels = batch(dtype=torch.float32)
    loss.update(loss.sums(embeddings, labels))
    same = (loss.centers == before).all(dim=1)
    assert same.nonzero().flatten().tolist() == UNSEEN
    assert set(labels.tolist()).isdisjoint(UNSEEN)


def test_sums_equal_the_loop_and_those_of_parts_add_up():
    loss = center_loss()
    embeddings, labels = batch()
    differences, counts = loss.sums(embeddings, labels)
    for j in range(NUM_CLASSES):
        own = [i for i, y in enumerate(labels.tolist()) if y == j]
        assert counts[j].item() == len(own)
        expected = sum(((loss.centers[j] - embeddings[i]).detach() for i in own), torch.zeros(DIM).double())
        assert_close(differences[j], expected, rtol=1e-12, atol=1e-14)

    parts = [loss.sums(embeddings[p], labels[p]) for p in (slice(0, 4), slice(4, 4), slice(4, 5), slice(5, 11))]
    assert_close(sum(part.differences for part in parts), differences, rtol=1e-12, atol=1e-14)
    assert torch.equal(sum(part.counts for part in parts), counts)


def test_an_empty_batch_costs_nothing_and_moves_nothing():
    loss = center_loss()
    before = loss.centers.clone()
    embeddings, labels = torch.zeros(0, DIM, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    assert loss(embeddings, labels).item() == 0
    loss.update(loss.sums(embeddings, labels))
    assert torch.equal(loss.centers, before)


def test_repeated_calls_give_the_same_bits():
    loss = center_loss(dtype=torch.float32)
    embeddings, labels = batch(num=300, dtype=torch.float32)
    first = loss.sums(embeddings, labels)
    for _ in range(5):
        again = loss.sums(embeddings, labels)
        assert torch.equal(first.differences, again.differences)
        assert torch.equal(first.counts, again.counts)


def test_centres_are_saved_state_and_not_parameters():
    loss = center_loss()
    assert list(loss.parameters()) == []
    assert [name for name, _ in loss.named_buffers()] == ["centers"]
    restored = CenterLoss(NUM_CLASSES, DIM).double()
    restored.load_state_dict(loss.state_dict())
    assert torch.equal(restored.centers, loss.centers)


def test_the_loss_moves_no_centre_and_the_update_keeps_no_graph():
    loss = center_loss()
    before = loss.centers.clone()
    embeddings, labels = batch()
    loss(embeddings, labels).backward()
    assert torch.equal(loss.centers, before)
    sums = loss.sums(embeddings, labels)
    loss.update(sums)
    assert not sums.differences.requires_grad
    assert not loss.centers.requires_grad
    assert not torch.equal(loss.centers, before)


def test_bfloat16_embeddings_are_computed_in_float32_under_autocast():
    loss = center_loss(dtype=torch.float32)
    embeddings, labels = batch(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss(embeddings, labels)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, loss(embeddings.float(), labels))


def test_bfloat16_embeddings_are_summed_in_float32():
    loss = center_loss(dtype=torch.float32)
    embeddings, labels = batch(dtype=torch.bfloat16)
    sums, expected = loss.sums(embeddings, labels), loss.sums(embeddings.float(), labels)
    assert sums.differences.dtype == torch.float32
    assert torch.equal(sums.differences, expected.differences)


def test_sums_are_the_same_under_autocast():
    loss = center_loss(dtype=torch.float32)
    embeddings, labels = batch(dtype=torch.float32)
    expected = loss.sums(embeddings, labels)
    with torch.autocast("cpu", torch.bfloat16):
        sums = loss.sums(embeddings, labels)
    assert torch.equal(sums.differences, expected.differences)


@pytest.mark.parametrize("alpha", [0.0, -0.5, 1.01, math.nan])
def test_alpha_out_of_range_is_named(alpha):
    with pytest.raises(ValueError, match="alpha"):
        CenterLoss(3, 2, alpha)


@pytest.mark.parametrize("labels", [[2, 0, 2, 2, 5], [1], [], [3, 3, 3]])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_rows_are_added_as_in_the_loop_on_either_device(labels, dtype, rtol, monkeypatch):
    rows, labels = torch.randn(len(labels), 4, dtype=dtype), torch.tensor(labels, dtype=torch.int64)
    before = torch.randn(6, 4, dtype=dtype)
    expected = before.clone()
    for row, label in zip(rows, labels, strict=True):
        expected[label] += row
    assert_close(add_rows(before.clone(), labels, rows), expected, rtol=rtol, atol=rtol)
    as_a_gpu = before.clone().index_put_((labels,), rows, accumulate=True)
    assert_close(as_a_gpu, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("size", [128, 512])
def test_rows_are_added_to_the_same_bits_each_time(size):
    """With several threads and float32, where an order that changes shows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        generator = torch.Generator().manual_seed(0)
        rows, labels = torch.randn(size, 513, generator=generator), torch.randint(7, (size,), generator=generator)
        first = add_rows(torch.zeros(7, 513), labels, rows)
        assert all(torch.equal(add_rows(torch.zeros(7, 513), labels, rows), first) for _ in range(100))
    finally:
        torch.set_num_threads(threads)
