"""Crop, flip and normalisation of batches against one image at a time in numpy."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlops_dist.config import Augment
from dlops_dist.data import augment as module
from dlops_dist.data.augment import (
    Augmenter,
    Normalize,
    augment,
    color_jitter,
    crop_and_flip,
    cutout,
    random_resized_crop,
)
from dlops_dist.data.draws import epoch_keys, uniform
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
    result = crop_and_flip(images, ids, epoch_keys(seed, epoch), padding, flip)
    assert result.dtype == torch.uint8
    assert result.is_contiguous()
    for image, after, (y, x), mirror in zip(images.numpy(), result.numpy(), place, mirrored, strict=True):
        down, right = int(y * (2 * padding + 1)), int(x * (2 * padding + 1))
        assert np.array_equal(after, changed(image, padding, down, right, flip and mirror))


def test_every_place_and_mirroring_is_equally_frequent():
    n, padding = 2000, 2
    images = random_images(n, 5, 7)
    result = crop_and_flip(images, torch.arange(n), epoch_keys(1, 4), padding=padding, flip=True)
    found = [recovered(a, b, padding) for a, b in zip(images.numpy(), result.numpy(), strict=True)]
    counts = np.zeros((5, 5, 2))
    np.add.at(counts, tuple(np.array(found).T), 1)
    chi2 = ((counts - n / 50) ** 2 / (n / 50)).sum()
    assert chi2 < 49 + 5 * np.sqrt(2 * 49)


def test_a_sample_is_changed_alike_in_any_batch():
    images, ids = random_images(9), torch.arange(100, 109)
    together = crop_and_flip(images, ids, epoch_keys(3, 2), 4, True)
    turned = torch.tensor([4, 0, 8, 1])
    assert torch.equal(crop_and_flip(images[turned], ids[turned], epoch_keys(3, 2), 4, True), together[turned])
    for i in range(9):
        assert torch.equal(crop_and_flip(images[i : i + 1], ids[i : i + 1], epoch_keys(3, 2), 4, True)[0], together[i])


@pytest.mark.parametrize(("seed", "epoch"), [(1, 0), (0, 1)])
def test_another_seed_or_epoch_changes_images_otherwise(seed, epoch):
    images, ids = random_images(64), torch.arange(64)
    first, other = (
        crop_and_flip(images, ids, epoch_keys(0, 0), 4, True),
        crop_and_flip(images, ids, epoch_keys(seed, epoch), 4, True),
    )
    same = sum(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert same < 6  # 1 in 162 by chance


def test_without_padding_and_flip_images_stay_as_they_are():
    images = random_images(4)
    assert torch.equal(crop_and_flip(images, torch.arange(4), epoch_keys(0, 0), 0, False), images)


@pytest.mark.parametrize("padding", [1, 2, 3, 4, 8, 12, 16])
def test_the_largest_draw_still_crops_inside_the_padded_image(padding, monkeypatch):
    monkeypatch.setattr(module, "drawn", lambda keys, purpose, ids, n: torch.full((len(ids), n), 1 - 2**-24))
    images = random_images(2)
    result = crop_and_flip(images, torch.arange(2), epoch_keys(0, 0), padding, False)
    for before, after in zip(images.numpy(), result.numpy(), strict=True):
        assert np.array_equal(after, changed(before, padding, 2 * padding, 2 * padding, False))


def test_on_a_gpu_one_gather_cuts_what_a_cpu_cuts_by_windows():
    images, generator = random_images(50, 12, 14), torch.Generator().manual_seed(0)
    offset = torch.randint(0, 5, (50, 2), generator=generator)
    mirrored = torch.rand(50, generator=generator) < 0.5
    expected = module._cut_by_windows(images, offset, mirrored, 8, 10)
    assert torch.equal(module._cut_by_gather(images, offset, mirrored, 8, 10), expected)


def enlarged(image: np.ndarray, top: int, left: int, cut_height: int, cut_width: int) -> np.ndarray:
    """A part of one image, enlarged to the image's size: bilinear, pixel by pixel, float64."""
    height, width, _ = image.shape
    out = np.empty(image.shape)
    for i in range(height):
        for j in range(width):
            y = min(max(top + (i + 0.5) * cut_height / height - 0.5, 0), height - 1)
            x = min(max(left + (j + 0.5) * cut_width / width - 0.5, 0), width - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            upper = image[y0, x0] * (1 - (x - x0)) + image[y0, x1] * (x - x0)
            lower = image[y1, x0] * (1 - (x - x0)) + image[y1, x1] * (x - x0)
            out[i, j] = upper * (1 - (y - y0)) + lower * (y - y0)
    return out


def test_a_resized_crop_equals_a_loop_over_pixels():
    images, ids = random_images(30, 9, 12), torch.arange(30) + 7
    area, ratio, wide, down, right = uniform(key(4, 1, "resized crop"), ids, 5).double().numpy().T
    result = random_resized_crop(images, ids, epoch_keys(4, 1), least_area=0.2)
    for i, image in enumerate(images.numpy()):
        pixels, shape = (0.2 + 0.8 * area[i]) * 9 * 12, 0.75 + 0.25 * ratio[i]
        sides = np.sqrt(pixels * shape), np.sqrt(pixels / shape)
        tall, broad = sides if wide[i] < 0.5 else sides[::-1]
        h, w = round(min(tall, 9)), round(min(broad, 12))
        expected = enlarged(image, int(down[i] * (9 - h + 1)), int(right[i] * (12 - w + 1)), h, w)
        assert np.abs(result[i].numpy() - expected).max() <= 0.5 + 1e-3


def test_a_resized_crop_covers_the_areas_it_should():
    """Of a ramp, the result's range of values is the part that was cut."""
    images = torch.arange(250, dtype=torch.uint8)[None, None, :, None].expand(3000, 250, 250, 3)[:400]
    result = random_resized_crop(images, torch.arange(400), epoch_keys(0, 0), least_area=0.25).double()
    width = (result.amax(dim=(1, 2, 3)) - result.amin(dim=(1, 2, 3)) + 1) / 250
    assert 0.25**0.5 * 0.75**0.5 - 0.02 <= width.min() < 0.5
    assert width.max() == 1
    assert abs(width.square().mean() - 0.625) < 0.05  # ratios cancel in the mean; those over the edge are cut


def test_color_jitter_equals_one_change_after_the_other():
    images, ids, strengths = random_images(20, 5, 7), torch.arange(20), (0.4, 0.3, 0.9)
    draws = uniform(key(2, 3, "colors"), ids, 3).double().numpy()
    luma = np.array([77, 150, 29]) / 256
    for image, drawn, after in zip(
        images.numpy(), draws, color_jitter(images, ids, epoch_keys(2, 3), strengths), strict=True
    ):
        brightness, contrast, saturation = 1 - np.array(strengths) + 2 * np.array(strengths) * drawn
        x = image * brightness
        x = contrast * x + (1 - contrast) * (x @ luma).mean()
        x = saturation * x + (1 - saturation) * (x @ luma)[..., None]
        assert np.abs(after.numpy() - np.clip(x, 0, 255)).max() <= 0.5 + 1e-3


def test_cutout_paints_one_square_in_the_mean_colour():
    n, side = 500, 4
    images = random_images(n, 9, 9) // 2  # the mean colour below does not occur
    result = cutout(images, torch.arange(n), epoch_keys(0, 0), side, torch.tensor([204, 178, 153], dtype=torch.uint8))
    painted = (result != images).any(dim=3)
    assert (result[painted] == torch.tensor([204, 178, 153])).all()
    whole = painted.sum(dim=(1, 2)) == side**2
    assert 0.3 < whole.double().mean() < 0.6  # (6 / 9)^2: the others reach over the edge
    rows, columns = painted.any(dim=2).sum(dim=1), painted.any(dim=1).sum(dim=1)
    assert torch.equal(rows * columns, painted.sum(dim=(1, 2)))
    assert set(rows.tolist()) == set(columns.tolist()) == {2, 3, 4}
    covering = np.array([3, 4, 4, 4, 4, 4, 4, 3, 2]) / 9  # of nine places along a side, those that cover a pixel
    chance = np.outer(covering, covering)
    assert (np.abs(painted.sum(dim=0).numpy() - n * chance) < 5 * np.sqrt(n * chance)).all()


FILL = torch.tensor([128, 102, 76], dtype=torch.uint8)
EVERYTHING = Augment(resized_crop=0.3, brightness=0.4, contrast=0.4, saturation=0.4, cutout=5)


@pytest.mark.parametrize("size", [1, 2, 5, 13])
def test_all_changes_of_a_sample_are_the_same_bits_in_any_batch(size):
    images, ids = random_images(39, 17, 19), torch.arange(39) * 1000
    changed = Augmenter(EVERYTHING, 5, (0.5, 0.4, 0.3), torch.device("cpu"))
    together = changed(images, ids, 1)
    assert not torch.equal(together, images)
    split = zip(images.split(size), ids.split(size), strict=True)
    parts = [changed(part, own, 1) for part, own in split]
    assert torch.equal(torch.cat(parts), together)


def test_nothing_is_changed_where_nothing_is_chosen():
    images = random_images(4)
    nothing = Augment(crop_padding=0, flip=False)
    assert augment(images, torch.arange(4), epoch_keys(0, 0), nothing, FILL) is images


def test_all_changes_of_an_empty_part():
    images = torch.empty(0, 6, 8, 3, dtype=torch.uint8)
    ids = torch.empty(0, dtype=torch.int64)
    assert augment(images, ids, epoch_keys(0, 0), EVERYTHING, FILL).shape == (0, 6, 8, 3)


@pytest.mark.parametrize("chosen", [Augment(), Augment(cutout=5), EVERYTHING])
def test_compiled_changes_are_the_same_bits_in_every_epoch(chosen, monkeypatch):
    compilations = []

    def backend(graph, _):
        compilations.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    images, ids = random_images(39, 17, 19), torch.arange(39) * 1000
    plain, fused = (Augmenter(chosen, 5, (0.5, 0.4, 0.3), torch.device("cpu"), compiled) for compiled in (False, True))
    for epoch in range(3):
        assert torch.equal(fused(images, ids, epoch), plain(images, ids, epoch))
    assert len(compilations) == (chosen is not EVERYTHING)  # what may round is left alone


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 2])
def test_an_empty_part_stays_empty(padding, flip):
    images = torch.empty(0, 6, 8, 3, dtype=torch.uint8)
    assert crop_and_flip(images, torch.empty(0, dtype=torch.int64), epoch_keys(0, 0), padding, flip).shape == (
        0,
        6,
        8,
        3,
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"),  # a few roundings of values up to 4
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.02)],
)
def test_normalize_equals_numpy_in_float64(dtype, tolerance):
    mean, std = (0.48, 0.45, 0.4), (0.277, 0.269, 0.282)
    images = random_images(5)
    result = Normalize(mean, std, dtype)(images)
    expected = ((images.numpy().astype(np.float64) / 255 - mean) / std).transpose(0, 3, 1, 2)
    assert result.dtype == dtype
    assert np.abs(result.double().numpy() - expected).max() < tolerance


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("augmented", [False, True])
def test_normalize_gives_the_wanted_memory_format(augmented, memory_format):
    images = random_images(5)
    if augmented:
        images = crop_and_flip(images, torch.arange(5), epoch_keys(0, 0), 2, True)
    result = Normalize((0.5,) * 3, (0.25,) * 3, torch.float32, memory_format)(images)
    assert result.shape == (5, 3, 6, 8)
    assert result.is_contiguous(memory_format=memory_format)
