"""What no loss takes for labels, and what it says of it."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from dlops_dist.losses import CenterLoss, CrossEntropyLoss, ReconstructionLoss, TripletLoss

N, D, C = 6, 3, 4
CENTER = CenterLoss(C, D)
LOSSES = {
    "cross-entropy": CrossEntropyLoss(),
    "triplet": TripletLoss(),
    "triplet, all": TripletLoss(mining="all"),
    "centre": CENTER,
    "centre, sums": CENTER.sums,
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def call(name, labels, num=N):
    values = torch.randn(num, C if name == "cross-entropy" else D, generator=torch.Generator().manual_seed(0))
    return LOSSES[name](values, labels)


@each_loss
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_whole_type_are_the_same_labels(name, dtype):
    labels = torch.tensor([0, 1, 1, 0, 3, 3])
    for ours, expected in zip(tree_leaves(call(name, labels.to(dtype))), tree_leaves(call(name, labels)), strict=True):
        assert torch.equal(ours, expected)


@each_loss
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.complex64])
def test_what_is_no_whole_number_is_refused(name, dtype):
    with pytest.raises(ValueError, match=f"whole numbers, not {dtype}"):
        call(name, torch.tensor([0, 1, 1, 0, 1, 1]).to(dtype))


@each_loss
@pytest.mark.parametrize("shape", [(1,), (N - 1,), (N + 1,), (N, 1), ()])
def test_other_numbers_of_labels_are_refused(name, shape):
    with pytest.raises(ValueError, match=rf"shape \({N},\)"):
        call(name, torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("name", ["cross-entropy", "centre", "centre, sums"])
@pytest.mark.parametrize("wrong", [-1, C, 2**40])
def test_labels_without_a_class_are_refused(name, wrong):
    with pytest.raises(ValueError, match=f"from 0 to {C - 1}, not {wrong}"):
        call(name, torch.tensor([0, 1, 1, wrong, 3, 3]))


@each_loss
def test_no_samples_need_no_labels(name):
    call(name, torch.empty(0, dtype=torch.int64), num=0)


def test_reconstructions_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="reconstructions"):
        ReconstructionLoss()(torch.zeros(4, 3), torch.zeros(4, 1))


def test_triplets_of_several_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        TripletLoss().from_triplets(torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(1, 3))


@pytest.mark.parametrize("name", ["cross-entropy", "centre"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_passed_on_in_value_and_gradient(name, bad):
    x = torch.randn(N, C if name == "cross-entropy" else D, generator=torch.Generator().manual_seed(0))
    x[2, 0] = bad
    x.requires_grad_()
    value = LOSSES[name](x, torch.tensor([0, 1, 1, 0, 3, 3]))
    value.backward()
    assert not value.isfinite()
    assert not x.grad[2].isfinite().all()
