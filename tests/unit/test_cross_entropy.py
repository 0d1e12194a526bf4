"""CrossEntropyLoss against a loop of its equation, torch's own, and finite differences."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from dlops_dist.losses import CrossEntropyLoss

SMOOTHINGS = [0.0, 0.1, 0.9]


def batch(num=7, num_classes=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num, num_classes, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), torch.randint(num_classes, (num,), generator=generator)


def loop_losses(logits, labels, smoothing):
    """l_i = log sum_j exp(z_ij) - (1 - s) z_iy - s/C sum_j z_ij, sample by sample."""
    losses = []
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        log_sum = math.log(math.fsum(math.exp(value) for value in z))
        losses.append(log_sum - (1 - smoothing) * z[y] - smoothing / len(z) * math.fsum(z))
    return losses


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_sum_count_and_mean_equal_the_loop(smoothing):
    logits, labels = batch()
    loss = CrossEntropyLoss(smoothing)
    expected = loop_losses(logits, labels, smoothing)
    terms = loss.terms(logits, labels)
    assert terms.sum.item() == pytest.approx(math.fsum(expected), rel=1e-13)
    assert terms.count == len(expected)
    assert loss(logits, labels).item() == pytest.approx(math.fsum(expected) / len(expected), rel=1e-13)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_value_and_gradient_equal_torch(smoothing, dtype, rtol):
    logits, labels = batch(num=16, num_classes=11, dtype=dtype)
    ours = CrossEntropyLoss(smoothing)(logits, labels)
    theirs = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    assert_close(ours, theirs, rtol=rtol, atol=0)
    (our_gradient,) = torch.autograd.grad(ours, logits)
    (their_gradient,) = torch.autograd.grad(theirs, logits)
    assert_close(our_gradient, their_gradient, rtol=0, atol=rtol * their_gradient.norm().item())


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_gradient_equals_finite_differences(smoothing):
    logits, labels = batch()
    assert torch.autograd.gradcheck(lambda z: CrossEntropyLoss(smoothing)(z, labels), (logits,))


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_uniform_logits_cost_the_log_of_the_number_of_classes(smoothing):
    loss = CrossEntropyLoss(smoothing)(torch.full((3, 10), 4.0), torch.tensor([0, 5, 9]))
    assert loss.item() == pytest.approx(math.log(10), rel=1e-6)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_logits_that_would_overflow_exp_give_torchs_loss_and_gradient(smoothing):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-300.0, 300.0, 299.0]], requires_grad=True)
    labels = torch.tensor([1, 1])
    ours = CrossEntropyLoss(smoothing)(logits, labels)
    theirs = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    assert_close(ours, theirs, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    assert_close(*gradients, rtol=0, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_terms_of_parts_add_up_to_the_whole(smoothing):
    logits, labels = batch(num=9)
    loss = CrossEntropyLoss(smoothing)
    whole = loss.terms(logits, labels)
    parts = [loss.terms(logits[part], labels[part]) for part in (slice(0, 5), slice(5, 5), slice(5, 9))]
    assert_close(sum(part.sum for part in parts), whole.sum, rtol=1e-13, atol=0)
    assert sum(part.count for part in parts) == whole.count == 9
    (gradient_of_parts,) = torch.autograd.grad(sum(part.sum for part in parts), logits)
    (gradient,) = torch.autograd.grad(whole.sum, logits)
    assert_close(gradient_of_parts, gradient, rtol=0, atol=1e-14)


def test_an_empty_batch_costs_nothing():
    logits = torch.zeros(0, 4, requires_grad=True)
    loss = CrossEntropyLoss(0.1)(logits, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.shape == (0, 4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bfloat16_logits_are_computed_in_float32_under_autocast(smoothing):
    logits, labels = batch(num=33, num_classes=20, dtype=torch.bfloat16)
    loss = CrossEntropyLoss(smoothing)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss(logits, labels)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, loss(logits.float(), labels))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, 1.5, math.nan])
def test_label_smoothing_out_of_range_is_named(smoothing):
    with pytest.raises(ValueError, match="label_smoothing"):
        CrossEntropyLoss(smoothing)
