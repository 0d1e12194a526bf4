"""Corruption: what happens to a sample depends on (seed, epoch, id) alone."""

import pytest
import torch

from dlops_dist.data.corruption import corrupted

IDS = torch.tensor([5, 0, 123_456_789_012, 7, 5, 1, 2, 3, 4])
X = torch.randn(9, 1001, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["masking", "gaussian"])
def test_a_sample_is_corrupted_alike_in_any_batch(kind):
    whole = corrupted(X, IDS, 1, 2, kind, 0.3)
    order = torch.tensor([8, 3, 1, 0, 2, 7, 6, 5, 4])
    assert torch.equal(corrupted(X[order], IDS[order], 1, 2, kind, 0.3), whole[order])
    parts = [corrupted(X[i : i + 1], IDS[i : i + 1], 1, 2, kind, 0.3) for i in range(9)]
    assert torch.equal(torch.cat(parts), whole)
    changes = whole - X
    if kind == "gaussian":
        torch.testing.assert_close(changes[0], changes[4])  # the same id
    else:
        assert torch.equal(whole[0] == 0, whole[4] == 0)


@pytest.mark.parametrize("kind", ["masking", "gaussian"])
@pytest.mark.parametrize(("seed", "epoch"), [(1, 3), (2, 2)])
def test_it_changes_with_seed_and_epoch(kind, seed, epoch):
    assert not torch.equal(corrupted(X, IDS, 1, 2, kind, 0.3), corrupted(X, IDS, seed, epoch, kind, 0.3))


def test_masking_sets_its_share_to_zero_and_leaves_the_rest():
    x = torch.ones(64, 1000)
    masked = corrupted(x, torch.arange(64), 0, 0, "masking", 0.3)
    assert set(masked.unique().tolist()) == {0.0, 1.0}
    assert (masked == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    by_input = (masked == 0).float().mean(dim=0)
    assert by_input.std().item() == pytest.approx((0.3 * 0.7 / 64) ** 0.5, rel=0.1)  # independent draws


def test_gaussian_noise_is_normal():
    noise = corrupted(torch.zeros(200, 1001), torch.arange(200), 0, 0, "gaussian", 0.5) / 0.5
    n = noise.numel()
    assert abs(noise.mean().item()) < 5 / n**0.5
    assert noise.var().item() == pytest.approx(1, abs=5 * (2 / n) ** 0.5)
    assert (noise**4).mean().item() == pytest.approx(3, abs=5 * (96 / n) ** 0.5)
    assert noise.isfinite().all()
    assert (noise.abs() > 1.959964).float().mean().item() == pytest.approx(0.05, abs=0.003)
    pairs = torch.corrcoef(torch.stack([noise[:, :500].flatten(), noise[:, 501:1001].flatten()]))
    assert abs(pairs[0, 1].item()) < 5 / (n / 2) ** 0.5


@pytest.mark.parametrize(("kind", "level"), [("none", 0.3), ("masking", 0.0), ("gaussian", 0.0)])
def test_nothing_is_changed_where_nothing_is_wanted(kind, level):
    assert corrupted(X, IDS, 0, 0, kind, level) is X


def test_no_samples_are_no_samples():
    assert corrupted(X[:0], IDS[:0], 0, 0, "masking", 0.3).shape == (0, 1001)
