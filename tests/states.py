"""Compares the states that runs leave."""

import pytest
import torch


def tensors(tree, prefix=""):
    """{path: tensor} of a nested state."""
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {path: t for key, value in items for path, t in tensors(value, f"{prefix}/{key}").items()}


def distance(ours, theirs):
    """Norm of the difference, as a part of the norm (or of 1e-3, below which only rounding is left)."""
    assert torch.equal(ours.isnan(), theirs.isnan())
    ours, theirs = ours.double().nan_to_num(), theirs.double().nan_to_num()
    return (ours - theirs).norm().item() / max(theirs.norm().item(), 1e-3)


def with_total_sums(state):
    """A state whose sums, kept for each rank, are added up: those alone depend on the number of ranks."""
    return {**state, "sums": {name: value.sum(dim=0) for name, value in state["sums"].items()}}


def same_checkpoint(ours, theirs):
    """Whether two files hold the same bits: weights, centres, momenta, sums, settings."""
    ours, theirs = (torch.load(path, weights_only=True) for path in (ours, theirs))
    return same_state(ours, theirs)


def same_state(ours, theirs):
    """Whether two states hold the same bits."""
    first, second = tensors(ours), tensors(theirs)
    return first.keys() == second.keys() and all(
        torch.equal(first[name].nan_to_num(), second[name].nan_to_num()) for name in first
    )


def nearly(row, rel=1e-6):
    """What the row of a run that rounds otherwise must equal: numbers within `rel`, all else as it is."""
    return {k: pytest.approx(v, rel=rel) if isinstance(v, float) else v for k, v in row.items()}
