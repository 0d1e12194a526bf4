"""Image files of any format into what a shard holds: the same outcome whatever size is asked for."""

import io

import numpy as np
import pytest
from PIL import Image

from dlops_dist.data.images import decode, kept, packable

SEEN = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
SMOOTH = np.add.outer(np.arange(16), np.arange(24)).astype(np.uint8)[..., None].repeat(3, axis=2) * 6


def encoded(pixels, kind, **options):
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()


def with_orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return encoded(SMOOTH, "JPEG", exif=exif, quality=95)


def several_pictures():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 1
    Image.fromarray(SMOOTH).save(file, "MPO", save_all=True, append_images=[Image.fromarray(SEEN)], exif=exif)
    return file.getvalue()


def test_an_upright_jpeg_stays_as_it_is():
    for data in (
        encoded(SEEN, "JPEG"),
        encoded(SEEN[..., 0], "JPEG"),
        with_orientation(1),
        encoded(SEEN, "JPEG") + b"more",
        several_pictures(),
    ):
        image = packable(data, "jpg")
        assert (image.data, image.changed) == (data, "")
        assert np.array_equal(image.pixels, decode(data, "jpg"))
        assert packable(data, "jpg", size=16).pixels.shape == (16, 16, 3)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
@pytest.mark.parametrize("size", [None, 16])
def test_other_formats_are_read_whatever_they_are_called(kind, size):
    data = encoded(SMOOTH, kind, **({"lossless": True} if kind == "WEBP" else {}))
    raw, jpeg = packable(data, "npy", size), packable(data, "jpg", size)
    assert np.array_equal(raw.pixels, decode(raw.data, "npy"))
    assert np.array_equal(jpeg.pixels, decode(jpeg.data, "jpg"))
    if size is None:
        assert np.array_equal(raw.pixels, SMOOTH)
    assert np.abs(jpeg.pixels.astype(int) - raw.pixels).max() < 12
    assert raw.changed == ""
    assert jpeg.changed.startswith(f"made a JPEG of RGB ({kind}")


def test_cmyk_becomes_rgb():
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
    for extension, size in (("jpg", None), ("jpg", 8), ("npy", None)):
        assert np.abs(packable(data, extension, size).pixels.astype(int) - (255, 0, 0)).max() < 10


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("extension", ["jpg", "npy"])
def test_images_are_turned_as_their_exif_says(orientation, extension):
    turned = {
        2: SMOOTH[:, ::-1], 3: SMOOTH[::-1, ::-1], 4: SMOOTH[::-1], 5: SMOOTH.swapaxes(0, 1),
        6: np.rot90(SMOOTH, -1), 7: np.rot90(SMOOTH, 2).swapaxes(0, 1), 8: np.rot90(SMOOTH),
    }  # fmt: skip
    image = packable(with_orientation(orientation), extension)
    assert image.changed == "turned as its EXIF says"
    assert image.pixels.shape == turned[orientation].shape
    assert np.abs(image.pixels.astype(int) - turned[orientation]).max() < 12


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_of_16_bits_the_upper_8_are_taken(kind):
    values = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    image = packable(encoded(values, kind), "npy")
    assert np.array_equal(image.pixels, (values >> 8).astype(np.uint8)[..., None].repeat(3, axis=2))
    assert image.changed == "brought from 16 bits to 8"


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (200, 50)]
    image = packable(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "npy")
    assert (image.pixels == 200).all()
    assert image.changed == "first frame taken"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html>", "begins with b'<!DOCTYP'"),
        (encoded(SEEN, "JPEG")[:-60], "unreadable JPEG of mode RGB (image file is truncated"),
        (encoded(SEEN, "JPEG")[:-2], "unreadable JPEG of mode RGB (image file is truncated"),
        (encoded(SEEN, "PNG")[:-60], "unreadable PNG of mode RGB (image file is truncated"),
        (encoded(Image.new("1", (9000, 9000)), "PNG"), "9000"),
        (encoded(np.full((8, 8), 1e6, np.float32), "TIFF"), "not whole numbers"),
        (encoded(np.full((8, 8), 2**20, np.int32), "TIFF"), "beyond 16 bits"),
    ],
    ids=["empty", "a page", "cut off", "without its end", "a PNG cut off", "a bomb", "floats", "32 bits"],
)
@pytest.mark.parametrize("size", [None, 8])
@pytest.mark.parametrize("extension", ["jpg", "npy"])
def test_what_cannot_be_read_is_told_with_its_format(data, why, size, extension):
    with pytest.raises(ValueError, match=why.replace("(", "[(]")):
        packable(data, extension, size)


def test_a_wide_image_fills_the_square_with_its_middle():
    """Black on its left and right quarters: they are cropped away."""
    wide = np.zeros((16, 32, 3), np.uint8)
    wide[:, 8:24] = 200
    for extension, most in (("jpg", 4), ("npy", 0)):
        pixels = packable(encoded(wide, "PNG"), extension, size=8).pixels
        assert pixels.shape == (8, 8, 3)
        assert np.abs(pixels[:, 2:6].astype(int) - 200).max() <= most
        assert pixels.min() > 160  # at the edges the interpolation sees a little of what is cropped


KEPT = {
    "a JPEG": (encoded(SEEN, "JPEG"), "jpg"), "a grey JPEG": (encoded(SEEN[..., 0], "JPEG"), "jpg"),
    "a CMYK JPEG": (encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), "jpg"),
    "an upright one": (with_orientation(1), "jpg"), "a PNG": (encoded(SEEN, "PNG"), "png"),
    "with a palette": (encoded(Image.fromarray(SEEN).quantize(8), "PNG"), "png"),
    "transparent": (encoded(Image.fromarray(SEEN).convert("RGBA"), "PNG"), "png"),
    "a WebP": (encoded(SEEN, "WEBP"), "webp"), "raw pixels": (packable(encoded(SEEN, "PNG"), "npy").data, "npy"),
}  # fmt: skip


@pytest.mark.parametrize("what", KEPT)
def test_images_that_are_kept_stay_byte_by_byte(what):
    data, extension = KEPT[what]
    for most in (None, 16):
        image = kept(data, most)
        assert (image.data, image.extension, image.changed) == (data, extension, "")
        assert np.array_equal(image.pixels, decode(data, "jpg;npy;png;webp"))


@pytest.mark.parametrize(
    ("data", "extension", "what", "most"),
    [
        (with_orientation(6), "jpg", "turned as its EXIF says", 12),
        (encoded(SMOOTH, "BMP"), "png", "made a PNG of RGB", 0),
        (encoded(SMOOTH, "GIF"), "png", "made a PNG of RGB", 9),
        (encoded(SMOOTH.astype(np.uint16)[..., 0] * 256, "PNG"), "png", "brought from 16 bits to 8", 0),
    ],
)  # fmt: skip
def test_images_that_cannot_be_kept_become_a_jpeg_or_a_png(data, extension, what, most):
    image = kept(data)
    assert (image.extension, image.changed) == (extension, what)
    expected = np.rot90(SMOOTH, -1) if "EXIF" in what else SMOOTH
    assert np.abs(image.pixels.astype(int) - expected).max() <= most
    assert np.array_equal(image.pixels, decode(image.data, "jpg;png"))


@pytest.mark.parametrize(("kind", "extension", "most"), [("JPEG", "jpg", 8), ("PNG", "png", 0)])
@pytest.mark.parametrize("turned", [False, True])
def test_longer_shorter_sides_are_scaled_down_in_proportion(kind, extension, most, turned):
    pixels = np.add.outer(np.arange(64), np.arange(96)).astype(np.uint8)[..., None].repeat(3, axis=2)
    image = kept(encoded(pixels.swapaxes(0, 1) if turned else pixels, kind), most=32)
    assert (image.extension, image.changed) == (extension, "")
    assert image.pixels.shape == ((48, 32, 3) if turned else (32, 48, 3))
    expected = Image.fromarray(pixels).resize((48, 32), Image.Resampling.BICUBIC)
    found = image.pixels.swapaxes(0, 1) if turned else image.pixels
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= most


@pytest.mark.parametrize("data", [b"", b"<!DOCTYPE html>", encoded(SEEN, "JPEG")[:-60], encoded(SEEN, "PNG")[:-60]])
def test_what_cannot_be_read_is_not_kept(data):
    with pytest.raises(ValueError, match=r"empty|begins with|truncated"):
        kept(data)
