"""Parts of images of any size: where they lie, how they are scaled, and that nothing else moves a bit of them."""

import io
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from dlops_dist.config import Augment
from dlops_dist.data.augment import Augmenter
from dlops_dist.data.crops import NUM_DRAWS, Box, Crop, Cropped, crop_of, middle_of, opened, scaled, seen
from dlops_dist.data.draws import VIEW, uniform
from dlops_dist.data.images import decode, decode_reduced, encode
from dlops_dist.data.keys import key
from dlops_dist.data.loader import read_ahead
from dlops_dist.data.random_crops import RandomCrops, in_epoch
from dlops_dist.data.readers import Joined, open_readers
from dlops_dist.data.shards import Split, read_manifest
from dlops_dist.engine.learner import _in_views

CPU = torch.device("cpu")
CHOSEN = Augment(size=16, resized_crop=0.1)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def smooth(height, width):
    """Waves of some pixels, which neither a JPEG nor an enlargement loses."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 9 + y / 23), np.cos(y / 11), np.sin((x - y) / 17)]
    return (127 + 120 * np.stack(waves, axis=2)).astype(np.uint8)


def saved(pixels, kind, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def by_pillow(pixels, size):
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=None)).astype(int)


# scaling


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(8, 60), st.integers(0, 99))
def test_scaling_is_pillows_within_one(height, width, size, seed):
    pixels = noise(height, width, seed)
    found = scaled(pixels, size)
    assert (found.shape, found.dtype) == ((size, size, 3), np.uint8)
    assert np.abs(found.astype(int) - by_pillow(pixels, size)).max() <= 1


@pytest.mark.parametrize("box", [Box(0, 0, 75, 100), Box(10, 5, 60, 20), Box(74, 99, 1, 1), Box(3, 9, 24, 24)])
@pytest.mark.parametrize("kind", ["npy", "PNG", "WEBP"])
def test_the_part_that_is_seen_is_cut_out_and_scaled(kind, box):
    pixels = noise(75, 100)
    data = encode(pixels, kind) if kind == "npy" else saved(pixels, kind, lossless=True)
    top, left, height, width = box
    found = seen(data, "npy;png;webp", 75, 100, box, 24).astype(int)
    assert np.abs(found - by_pillow(pixels[top : top + height, left : left + width], 24)).max() <= 1


KINDS = {
    "usual": ("RGB", {}), "progressive": ("RGB", {"progressive": True}), "fine colours": ("RGB", {"subsampling": 0}),
    "grey": ("L", {}), "CMYK": ("CMYK", {}),
}  # fmt: skip


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("shape", "kind"),
    [((399, 297), "usual"), ((1000, 264), "usual"), *(((400, 300), kind) for kind in KINDS)],
)
def test_a_jpeg_is_reduced_as_pillow_reduces_it(shape, kind, factor):
    mode, options = KINDS[kind]
    file = io.BytesIO()
    Image.fromarray(smooth(*shape)).convert(mode).save(file, "JPEG", quality=95, **options)
    image = Image.open(file)
    image.draft(mode, (image.width // factor, image.height // factor))
    found = decode_reduced(file.getvalue(), "jpg", *shape, factor)
    assert found.shape[:2] == tuple(-(-side // factor) for side in shape)
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(found - expected).max() <= (kind == "CMYK")


@pytest.mark.parametrize(
    ("box", "size", "factor"),
    [
        (Box(0, 0, 300, 400), 150, 2), (Box(0, 0, 300, 400), 151, 1), (Box(7, 13, 130, 201), 32, 4),
        (Box(7, 13, 130, 201), 33, 2), (Box(299, 399, 1, 1), 8, 1), (Box(36, 40, 264, 360), 33, 8),
    ],
)  # fmt: skip
def test_a_jpeg_is_reduced_only_where_the_part_stays_as_large_as_is_wanted(box, size, factor, monkeypatch):
    """And what is then seen is what would be seen of the whole image, but for a fraction of a pixel."""
    used = []

    def noted(data, extension, height, width, by):
        used.append(by)
        return decode_reduced(data, extension, height, width, by)

    monkeypatch.setattr("dlops_dist.data.crops.decode_reduced", noted)
    pixels = smooth(300, 400)
    data = saved(pixels, "JPEG", quality=95)
    found = seen(data, "jpg", 300, 400, box, size).astype(int)
    assert used == [factor]
    whole = decode(data, "jpg")[box.top : box.top + box.height, box.left : box.left + box.width]
    expected = by_pillow(whole, size)
    difference = np.abs(found - expected)
    if factor == 1:
        assert difference.max() <= 1
    else:  # half a pixel of the reduced image at most, where one of the result is more
        assert all(difference.mean() < np.abs(found - np.roll(expected, 1, axis)).mean() / 2 for axis in (0, 1))


@pytest.mark.parametrize("factor", [1, 2])
def test_an_image_of_another_size_than_the_index_says_is_refused_unread(factor):
    data = saved(smooth(64, 48), "JPEG")
    with pytest.raises(ValueError, match=r"the image is \(64, 48, 3\), the manifest says \(48, 64, 3\)"):
        decode_reduced(data, "jpg", 48, 64, factor)


# where the part lies


def drawn(number, seed=0):
    return uniform(key(seed, 0, "resized crop"), torch.arange(number), NUM_DRAWS).double().numpy()


def naive_box(height, width, draws, area, aspect):
    """Torchvision's definition, in its own words, with given numbers in place of its random state."""
    for attempt in range(10):
        target = height * width * (area[0] + (area[1] - area[0]) * draws[2 * attempt])
        log_ratio = np.log(aspect[0]) + (np.log(aspect[1]) - np.log(aspect[0])) * draws[2 * attempt + 1]
        w, h = round(float(np.sqrt(target * np.exp(log_ratio)))), round(float(np.sqrt(target / np.exp(log_ratio))))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(draws[20] * (height - h + 1)), math.floor(draws[21] * (width - w + 1)), h, w
    ratio = width / height
    h, w = height, width
    if ratio < aspect[0]:
        h = round(width / aspect[0])
    elif ratio > aspect[1]:
        w = round(height * aspect[1])
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (64, 64), (3, 400), (400, 3), (20, 31), (1, 1)])
@pytest.mark.parametrize(("area", "aspect"), [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (0.9, 1.1))])
def test_a_random_part_is_the_one_that_the_draws_say(size, area, aspect):
    crop = Crop(8, 1.0, area, aspect)
    for draws in drawn(200):
        box = crop.box(*size, draws.tolist())
        assert box == naive_box(*size, draws, area, aspect)
        assert 0 <= box.top <= box.top + box.height <= size[0]
        assert 0 <= box.left <= box.left + box.width <= size[1]
        assert min(box.height, box.width) > 0


@pytest.mark.parametrize("size", [(375, 500), (64, 64), (40, 400)])
def test_random_parts_are_spread_as_torchvisions(size):
    """Means of what describes a part, within four standard errors."""
    number, area, aspect = 3000, (0.08, 1.0), (3 / 4, 4 / 3)
    crop, image = Crop(8, 1.0, area, aspect), torch.empty(3, *size)
    ours = np.array([crop.box(*size, draws.tolist()) for draws in drawn(number)], float)
    theirs = np.array([RandomResizedCrop.get_params(image, area, aspect) for _ in range(number)], float)
    for describe in (lambda b: b, np.square, lambda b: np.log(b[:, 2:] / b[:, :1:-1]), lambda b: b[:, [2]] * b[:, [3]]):
        a, b = describe(ours), describe(theirs)
        error = np.sqrt((a.var(axis=0) + b.var(axis=0)) / number)
        assert (np.abs(a.mean(axis=0) - b.mean(axis=0)) <= 4 * error + 1e-12).all()


@pytest.mark.parametrize(
    ("size", "part", "box"),
    [
        ((375, 500), 1.0, (0, 62, 375, 375)), ((375, 500), 0.875, (23, 86, 328, 328)), ((64, 64), 1.0, (0, 0, 64, 64)),
        ((9, 2), 0.1, (4, 0, 1, 1)),
    ],
)  # fmt: skip
def test_without_draws_the_middle_is_seen(size, part, box):
    assert Crop(8, part).box(*size) == box


# reading


@pytest.fixture(scope="module")
def split(any_size_shards):
    return opened(any_size_shards, read_manifest(any_size_shards), "train", CHOSEN)


def one_by_one(split, ids, seed, epoch, view=0):
    """Each part by its own draws, from bytes that are read alone."""
    crop, found = crop_of(CHOSEN), []
    for i in ids:
        draws = uniform(key(seed, epoch, "resized crop"), torch.tensor([i + view * VIEW]), NUM_DRAWS)[0].tolist()
        ((height, width),) = split.sizes(np.array([i]))
        split.each(
            np.array([i]),
            lambda _, data, s=(height, width), d=draws: found.append(
                seen(data, split.manifest.extension, *s, crop.box(*s, d), crop.size)[:, :: -1 if d[22] < 0.5 else 1]
            ),
        )
    return np.stack(found)


def test_shards_of_any_size_hold_jpg_png_and_webp(split):
    assert split.manifest.extension == "jpg;png;webp"
    assert len(set(split.sizes(np.arange(len(split))))) > 10
    with pytest.raises(Exception, match=r"differ in size; train with --augment\.size N"):
        _ = Split(split._folder, split.manifest, "train").size


def test_evaluation_sees_the_middle_of_each_image(split):
    ids = np.array([3, 0, 17, 3])
    sizes, datas = split.sizes(ids), []
    split.each(ids, lambda _, data: datas.append(data))
    crop = crop_of(CHOSEN)
    expected = [seen(d, split.manifest.extension, *s, crop.box(*s), 16) for d, s in zip(datas, sizes, strict=True)]
    assert np.array_equal(split.read(ids), np.stack(expected))
    assert in_epoch(split, Augment(size=16), 0, 0) is split


@dataclass
class Way:
    """Of reading an epoch: in how many parts, with how many threads, from which batch on."""

    ranks: int = 1
    threads: int = 1
    begin: int = 0


@pytest.mark.parametrize("way", [Way(), Way(ranks=3), Way(threads=4), Way(begin=2), Way(ranks=2, threads=3, begin=1)])
def test_a_sample_is_seen_alike_on_any_rank_in_any_batch_after_any_resume(way, split):
    order = np.random.default_rng(0).permutation(len(split))[:24].reshape(4, 6)
    expected = one_by_one(split, order.ravel(), seed=5, epoch=2).reshape(4, 6, 16, 16, 3)
    reader = in_epoch(split, CHOSEN, seed=5, epoch=2)
    bounds = np.linspace(0, 6, way.ranks + 1).astype(int)
    for first, end in pairwise(bounds):
        parts = ((ids, slice(first, end)) for ids in order[way.begin :])
        batches = list(read_ahead(reader, parts, CPU, way.threads, 3))
        assert len(batches) == 4 - way.begin
        for batch, wanted in zip(batches, expected[way.begin :], strict=True):
            assert np.array_equal(batch.images.numpy(), wanted[first:end])


def test_many_threads_that_read_at_once_give_the_bits_of_one(split):
    reader = in_epoch(split, CHOSEN, 1, 0)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(reader.read, np.arange(32).reshape(16, 2)))
    assert torch.equal(torch.cat(together), reader.read(np.arange(32)))


@pytest.mark.parametrize("other", [(1, 0), (0, 1)])
def test_another_seed_or_epoch_sees_other_parts(other, split):
    ids = np.arange(32)
    first, second = in_epoch(split, CHOSEN, 0, 0).read(ids), in_epoch(split, CHOSEN, *other).read(ids)
    assert sum(torch.equal(a, b) for a, b in zip(first, second, strict=True)) < 4


def test_each_view_of_a_sample_is_a_part_of_its_own(split):
    ids = np.array([4, 9, 4])
    views = in_epoch(split, CHOSEN, 3, 1, views=2).read(ids)
    assert views.shape == (3, 2, 16, 16, 3)
    for view in range(2):
        assert np.array_equal(views[:, view].numpy(), one_by_one(split, ids, 3, 1, view))
    assert not torch.equal(views[:, 0], views[:, 1])


def test_a_learner_finds_views_where_it_makes_them_itself(split):
    ids = np.array([4, 9, 7])
    (batch,) = read_ahead(in_epoch(split, CHOSEN, 3, 1, views=2), [(ids, slice(0, 3))], CPU, 1, 1)
    viewed, usual = _in_views(batch.part_of(slice(1, 3), False), 2), batch._replace(images=torch.zeros(3, 1, 1, 3))
    assert torch.equal(viewed.ids, _in_views(usual.part_of(slice(1, 3), False), 2).ids)
    assert viewed.ids.tolist() == [9, 9 + VIEW, 7, 7 + VIEW]
    for image, sample, view in zip(viewed.images.numpy(), [9, 9, 7, 7], [0, 1, 0, 1], strict=True):
        assert np.array_equal(image, one_by_one(split, [sample], 3, 1, view)[0])


def test_joined_readers_are_drawn_for_by_their_joint_ids(split, any_size_shards):
    test = opened(any_size_shards, split.manifest, "test", CHOSEN)
    joined, ids = Joined([split, test]), np.array([len(split) + 2, 0, len(split), 5])
    found = in_epoch(joined, CHOSEN, 0, 0).read(ids)
    draws = uniform(key(0, 0, "resized crop"), torch.from_numpy(ids), NUM_DRAWS).numpy()
    for i, (reader, place) in enumerate([(test, 2), (split, 0), (test, 0), (split, 5)]):
        assert np.array_equal(found[i].numpy(), reader.read(np.array([place]), draws[[i]])[0])


def test_parts_are_decoded_and_the_line_says_why(split, tmp_path):
    opened = open_readers([split], "auto", str(tmp_path), CPU, pytest.fail, pytest.fail)
    assert (opened.kind, opened.readers) == ("decode", [split])
    assert "augment.size" in opened.why
    assert list(tmp_path.iterdir()) == []


def test_every_second_random_part_is_mirrored_where_that_is_chosen(any_size_shards, split):
    ids, plain = np.arange(40), CHOSEN.model_copy(update={"flip": False})
    unflipped = in_epoch(opened(any_size_shards, split.manifest, "train", plain), plain, 0, 0).read(ids)
    found = in_epoch(split, CHOSEN, 0, 0).read(ids)
    mirrored = [torch.equal(a.flip(1), b) for a, b in zip(unflipped, found, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(unflipped, found, strict=True)]
    assert [a != b for a, b in zip(mirrored, same, strict=True)] == [True] * 40
    assert 10 < sum(mirrored) < 30


def test_a_part_that_was_cut_at_random_is_changed_further_but_not_cut_again(split):
    images, ids = in_epoch(split, CHOSEN, 0, 0).read(np.arange(8)), torch.arange(8)
    assert Augmenter(CHOSEN, 0, (0.5,) * 3, CPU)(images, ids, 0) is images
    colours = Augment(brightness=0.5, contrast=0.5, cutout=3)
    alone = colours.model_copy(update={"crop_padding": 0, "flip": False})
    both = CHOSEN.model_copy(update={"brightness": 0.5, "contrast": 0.5, "cutout": 3})
    wanted = Augmenter(alone, 0, (0.5,) * 3, CPU)(images, ids, 0)
    assert torch.equal(Augmenter(both, 0, (0.5,) * 3, CPU)(images, ids, 0), wanted)
    assert not torch.equal(wanted, images)


def test_shards_of_one_size_are_cut_too(shapes_shards):
    manifest = read_manifest(shapes_shards)
    split = opened(shapes_shards, manifest, "train", CHOSEN)
    whole = Split(shapes_shards, manifest, "train").read(np.arange(3))
    assert split.size == (16, 16)
    side = round(0.875 * 32)
    for found, image in zip(split.read(np.arange(3)), whole, strict=True):
        first = (32 - side) // 2
        part = image[first : first + side, first : first + side]
        assert np.abs(found.astype(int) - by_pillow(part, 16)).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_an_image_file_is_seen_as_evaluation_sees_it(kind):
    pixels = smooth(300, 200)
    data = saved(pixels, kind, **({"lossless": True} if kind == "WEBP" else {}))
    found = middle_of(data, Crop(100, 0.875)).astype(int)
    side = round(0.875 * 200)
    top, left = (300 - side) // 2, (200 - side) // 2
    expected = by_pillow(pixels[top : top + side, left : left + side], 100)
    assert np.abs(found - expected).max() <= (12 if kind == "JPEG" else 1)


def test_a_turned_jpeg_is_seen_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    found = middle_of(saved(smooth(300, 200), "JPEG", quality=95, exif=exif), Crop(40, 1.0))
    upright = middle_of(saved(np.rot90(smooth(300, 200), -1), "JPEG", quality=95), Crop(40, 1.0))
    assert np.abs(found.astype(int) - upright).max() < 12


def test_an_empty_part_is_read_as_one(split):
    nothing = np.empty(0, np.int64)
    assert split.read(nothing).shape == in_epoch(split, CHOSEN, 0, 0).read(nothing).shape == (0, 16, 16, 3)
    assert in_epoch(split, CHOSEN, 0, 0, views=2).read(nothing).shape == (0, 2, 16, 16, 3)


def test_only_images_are_cut(split):
    codes = type("Codes", (), {"labels": split.labels, "in_memory": True})()
    assert in_epoch(codes, CHOSEN, 0, 0) is codes
    assert isinstance(in_epoch(split, CHOSEN, 0, 0), RandomCrops)
    assert isinstance(split, Cropped)
