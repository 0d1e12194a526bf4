"""Mixup and cutmix against loops over images and pixels, and against draws of numpy's Beta."""

import numpy as np
import pytest
import torch

from dlops_dist.config import Augment
from dlops_dist.data.draws import epoch_keys
from dlops_dist.data.mixing import Mixer, quantiles

CPU, N, C = torch.device("cpu"), 40, 7
KEYS = epoch_keys(0, 0)


def batch(n=N):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n + 1, 9, 12, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(C, (n + 1,), generator=generator)
    return images, torch.arange(100, 100 + n), labels[:-1], labels[1:]


def mixed(images, ids, labels, following, **chosen):
    return Mixer(Augment(**chosen), C, CPU)(images, ids, labels, following, KEYS)


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 3.0])
def test_shares_are_those_of_beta(alpha):
    drawn = np.random.default_rng(0).beta(alpha, alpha, 200_000)
    expected = np.quantile(np.maximum(drawn, 1 - drawn), np.linspace(0, 1, 11)[1:-1])
    table = quantiles(alpha).numpy()
    assert (np.diff(table) >= 0).all()
    assert table[[0, -1]] == pytest.approx([0.5, 1])
    found = np.interp(np.linspace(0, 1, 11)[1:-1], np.linspace(0, 1, len(table)), table)
    assert found == pytest.approx(expected, abs=5e-3)


def test_mixup_lays_the_next_image_over_each():
    images, ids, labels, following = batch()
    x, targets = mixed(images, ids, labels, following, mixup=0.4)
    other = [i for i in range(N) if labels[i] != following[i]]
    shares = targets[torch.arange(N), labels]
    for i in other:
        share = shares[i].item()
        assert 0.5 <= share <= 1
        expected = share * images[i].double() + (1 - share) * images[i + 1].double()
        assert torch.allclose(x[i].double(), expected, atol=1e-3)
        assert targets[i, following[i]].item() == pytest.approx(1 - share, abs=1e-6)
    assert len({round(s, 6) for s in shares[other].tolist()}) > len(other) / 2
    assert torch.allclose(targets.sum(dim=1), torch.ones(N))


def test_cutmix_pastes_a_box_of_the_next_image():
    images, ids, labels, following = batch()
    images[::2], images[1::2] = 10, 200
    x, targets = mixed(images, ids, labels, following, cutmix=1.0)
    for i in range(N):
        foreign = (x[i] == images[i + 1, 0, 0]).all(dim=-1)
        rows, columns = foreign.any(dim=1).nonzero()[:, 0], foreign.any(dim=0).nonzero()[:, 0]
        assert foreign.sum() == len(rows) * len(columns), "one box"
        assert len(rows) == 0 or rows[-1] - rows[0] + 1 == len(rows)
        if labels[i] != following[i]:
            assert targets[i, following[i]].item() == pytest.approx(foreign.float().mean().item(), abs=1e-6)
        assert foreign.float().mean() <= 0.62  # half, and rounding to whole pixels
    assert 0.1 < (x != images[:-1]).float().mean() < 0.5


def test_with_both_each_image_is_changed_by_one():
    images, ids, labels, following = batch()
    x, _ = mixed(images, ids, labels, following, mixup=0.4, cutmix=1.0)
    by_box = mixed(images, ids, labels, following, cutmix=1.0)[0]
    laid_over = mixed(images, ids, labels, following, mixup=0.4)[0]
    boxes = [torch.equal(x[i], by_box[i]) for i in range(N)]
    assert all(is_box or torch.equal(x[i], laid_over[i]) for i, is_box in enumerate(boxes))
    assert 5 < sum(boxes) < N - 5


@pytest.mark.parametrize("chosen", [{"mixup": 0.2}, {"cutmix": 0.7}, {"mixup": 1.0, "cutmix": 1.0}])
def test_a_part_of_a_batch_is_mixed_as_the_whole_is(chosen):
    images, ids, labels, following = batch()
    whole = mixed(images, ids, labels, following, **chosen)
    for first, last in ((0, 13), (13, 13), (13, 40)):
        own = slice(first, last)
        part = mixed(images[first : last + 1], ids[own], labels[own], following[own], **chosen)
        assert all(torch.equal(ours, theirs[own]) for ours, theirs in zip(part, whole, strict=True))
