"""Crop, flip and normalisation of batches against one image at a time in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlops_dist.data import augment
from dlops_dist.data.augment import crop_and_flip, normalize
from dlops_dist.data.draws import uniform
from dlops_dist.data.keys import key


def random_images(n: int, height: int = 6, width: int = 8) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(n).integers(0, 256, (n, height, width, 3), np.uint8))


def changed(image: np.ndarray, padding: int, down: int, right: int, mirror: bool) -> np.ndarray:
    """One image, padded by zeros, cropped at (down, right), mirrored."""
    height, width, _ = image.shape
    padded = np.zeros((height + 2 * padding, width + 2 * padding, 3), np.uint8)
    padded[padding : padding + height, padding : padding + width] = image
    cropped = padded[down : down + height, right : right + width]
    return cropped[:, ::-1] if mirror else cropped


def recovered(before: np.ndarray, after: np.ndarray, padding: int) -> tuple[int, int, bool]:
    """Which (down, right, mirror) made one image out of the other: the only one of all that fits."""
    places = range(2 * padding + 1)
    fits = [
        (down, right, mirror)
        for down in places
        for right in places
        for mirror in (False, True)
        if np.array_equal(changed(before, padding, down, right, mirror), after)
    ]
    assert len(fits) == 1
    return fits[0]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 2**40), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
    st.integers(0, 99),
    st.integers(0, 5),
    st.booleans(),
)
def test_crop_and_flip_equals_a_loop_over_images(ids, seed, epoch, padding, flip):
    ids = torch.tensor(ids)
    images = random_images(len(ids))
    place = uniform(key(seed, epoch, "crop"), ids, 2).double().numpy()
    mirrored = uniform(key(seed, epoch, "flip"), ids, 1).numpy()[:, 0] < 0.5
    result = crop_and_flip(images, ids, seed, epoch, padding, flip)
    assert result.dtype == torch.uint8
    assert result.is_contiguous()
    for image, after, (y, x), mirror in zip(images.numpy(), result.numpy(), place, mirrored, strict=True):
        down, right = int(y * (2 * padding + 1)), int(x * (2 * padding + 1))
        assert np.array_equal(after, changed(image, padding, down, right, flip and mirror))


def test_every_place_and_mirroring_is_equally_frequent():
    n, padding = 2000, 2
    images = random_images(n, 5, 7)
    result = crop_and_flip(images, torch.arange(n), seed=1, epoch=4, padding=padding, flip=True)
    found = [recovered(a, b, padding) for a, b in zip(images.numpy(), result.numpy(), strict=True)]
    counts = np.zeros((5, 5, 2))
    np.add.at(counts, tuple(np.array(found).T), 1)
    chi2 = ((counts - n / 50) ** 2 / (n / 50)).sum()
    assert chi2 < 49 + 5 * np.sqrt(2 * 49)


def test_a_sample_is_changed_alike_in_any_batch():
    images, ids = random_images(9), torch.arange(100, 109)
    together = crop_and_flip(images, ids, 3, 2, 4, True)
    turned = torch.tensor([4, 0, 8, 1])
    assert torch.equal(crop_and_flip(images[turned], ids[turned], 3, 2, 4, True), together[turned])
    for i in range(9):
        assert torch.equal(crop_and_flip(images[i : i + 1], ids[i : i + 1], 3, 2, 4, True)[0], together[i])


@pytest.mark.parametrize(("seed", "epoch"), [(1, 0), (0, 1)])
def test_another_seed_or_epoch_changes_images_otherwise(seed, epoch):
    images, ids = random_images(64), torch.arange(64)
    first, other = crop_and_flip(images, ids, 0, 0, 4, True), crop_and_flip(images, ids, seed, epoch, 4, True)
    same = sum(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert same < 6  # 1 in 162 by chance


def test_without_padding_and_flip_images_stay_as_they_are():
    images = random_images(4)
    assert torch.equal(crop_and_flip(images, torch.arange(4), 0, 0, 0, False), images)


@pytest.mark.parametrize("padding", [1, 2, 3, 4, 8, 12, 16])
def test_the_largest_draw_still_crops_inside_the_padded_image(padding, monkeypatch):
    monkeypatch.setattr(augment, "uniform", lambda key, ids, n: torch.full((len(ids), n), 1 - 2**-24))
    images = random_images(2)
    result = crop_and_flip(images, torch.arange(2), 0, 0, padding, False)
    for before, after in zip(images.numpy(), result.numpy(), strict=True):
        assert np.array_equal(after, changed(before, padding, 2 * padding, 2 * padding, False))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 2])
def test_an_empty_part_stays_empty(padding, flip):
    images = torch.empty(0, 6, 8, 3, dtype=torch.uint8)
    assert crop_and_flip(images, torch.empty(0, dtype=torch.int64), 0, 0, padding, flip).shape == (0, 6, 8, 3)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),  # a few roundings of values up to 4
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.02)],
)
def test_normalize_equals_numpy_in_float64(dtype, tolerance):
    mean, std = (0.48, 0.45, 0.4), (0.277, 0.269, 0.282)
    images = random_images(5)
    result = normalize(images, mean, std, dtype)
    expected = ((images.numpy().astype(np.float64) / 255 - mean) / std).transpose(0, 3, 1, 2)
    assert result.dtype == dtype
    assert np.abs(result.double().numpy() - expected).max() < tolerance


@pytest.mark.parametrize("augmented", [False, True])
def test_normalize_gives_channels_last(augmented):
    images = random_images(5)
    if augmented:
        images = crop_and_flip(images, torch.arange(5), 0, 0, 2, True)
    result = normalize(images, (0.5,) * 3, (0.25,) * 3, torch.float32)
    assert result.shape == (5, 3, 6, 8)
    assert result.is_contiguous(memory_format=torch.channels_last)
