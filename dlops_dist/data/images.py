"""An image file of any common format into what a shard holds of it."""

import io
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dlops_dist.data.codec import check_size, decode, encode

if TYPE_CHECKING:
    from PIL import Image

JPEG = b"\xff\xd8\xff"
NPY = b"\x93NUMPY"
ORIENTATION, UPRIGHT = 0x0112, 1
"""The EXIF tag; from 2 to 8 an image is to be turned or mirrored."""


class Packable(NamedTuple):
    """One image, ready for a shard."""

    data: bytes
    pixels: np.ndarray
    """What `data` decodes to, uint8 (height, width, 3)."""
    changed: str
    """What had to be done to the file, beside another size; empty where nothing."""


def packable(data: bytes, extension: str, size: int | None = None) -> Packable:
    """An image file's bytes as a shard of jpg or npy holds them.

    A JPEG that stands upright and decodes without a warning stays as it is, byte by byte. All others are turned as
    their EXIF says, brought to RGB of 8 bits, and encoded anew.

    Args:
        size: where given, the shorter side is scaled to it by bicubic interpolation, the longer one cropped in the
            middle, unless the image is size x size already.

    Raises:
        ValueError: it is no image that can be read to its end.
    """
    pixels, changed = _pixels(data, extension)
    if size is None or pixels.shape[:2] == (size, size):
        if not changed and data.startswith(JPEG if extension == "jpg" else NPY):
            return Packable(data, pixels, changed)
    else:
        from PIL import Image, ImageOps

        pixels = np.asarray(ImageOps.fit(Image.fromarray(pixels), (size, size), Image.Resampling.BICUBIC))
    encoded = encode(pixels, extension)
    return Packable(encoded, decode(encoded, extension), changed)


def _pixels(data: bytes, extension: str) -> tuple[np.ndarray, str]:
    """Upright RGB, and what had to be done beside decoding."""
    if not data:
        raise ValueError("it is empty")
    if data.startswith(NPY):
        return decode(data, "npy"), ""
    if data.startswith(JPEG) and (b"Exif\0\0" not in data[: 2**16] or _orientation(data) == UPRIGHT):
        try:
            return decode(data, "jpg"), ""
        except ValueError:
            pass  # Pillow reads more, or says what is wrong with it
    return _by_pillow(data, extension)


def _orientation(data: bytes) -> int:
    """Of a JPEG, by its EXIF; upright where it has none that can be read."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            number = int(image.getexif().get(ORIENTATION, UPRIGHT))
    except (OSError, ValueError, TypeError, SyntaxError):
        return UPRIGHT
    return number if UPRIGHT < number <= 8 else UPRIGHT


def _by_pillow(data: bytes, extension: str) -> tuple[np.ndarray, str]:
    from PIL import Image, ImageOps

    kind = "JPEG" if data.startswith(JPEG) else "image"
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = f"{image.format} of mode {image.mode}"
            check_size(image.height, image.width)
            turned = image.getexif().get(ORIENTATION) in range(UPRIGHT + 1, 9)
            pixels = _eight_bits(ImageOps.exif_transpose(image) if turned else image)
    except Image.UnidentifiedImageError:
        raise ValueError(f"no image: it begins with {data[:8]!r}") from None
    except (OSError, ValueError, SyntaxError, IndexError, Image.DecompressionBombError) as error:
        raise ValueError(f"unreadable {kind} ({error})") from None
    if turned:
        return pixels, "turned as its EXIF says"
    if getattr(image, "n_frames", 1) > 1:
        return pixels, "first frame taken"
    if image.mode.startswith("I"):
        return pixels, "brought from 16 bits to 8"
    return pixels, f"made a JPEG of RGB ({kind})" if extension == "jpg" else ""


def _eight_bits(image: "Image.Image") -> np.ndarray:
    """RGB; of 16 bits the upper 8, as Pillow itself does with 16-bit colours."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() >= 2**16:
            raise ValueError(f"its pixels are {image.mode}, beyond 16 bits")
        return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode.startswith("F"):
        raise ValueError(f"its pixels are {image.mode}, not whole numbers")
    return np.asarray(image.convert("RGB"))
