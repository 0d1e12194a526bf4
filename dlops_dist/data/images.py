"""Bytes of an image into pixels, and back; and an image file of any common format into what a shard holds of it.

Nothing is unpickled; what claims an absurd size is refused unread.
"""

import io
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import simplejpeg

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 2**26
"""Of one image: more is taken for a decompression bomb."""
NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\0..\{'descr': '\|u1', 'fortran_order': (True|False), 'shape': \((\d{1,9}), (\d{1,9}), 3\), \} *\n",
    re.DOTALL,
)
"""Version 1.0, read by its letters: numpy's own reader evaluates it as Python."""
JPEG_QUALITY = 95
"""Of images that had to be resized."""
JPEG = b"\xff\xd8\xff"
NPY = b"\x93NUMPY"
PNG = b"\x89PNG\r\n\x1a\n"
WEBP = re.compile(rb"RIFF....WEBP", re.DOTALL)
ORIENTATION, UPRIGHT = 0x0112, 1
"""The EXIF tag; from 2 to 8 an image is to be turned or mirrored."""


def decode(data: bytes, extension: str, out: np.ndarray | None = None) -> np.ndarray:
    """One image, uint8 (height, width, 3), RGB; into `out` where given.

    Args:
        extension: jpg, npy for raw pixels; of shards with others among them, whose first bytes tell the kind, anything.

    Raises:
        ValueError: no such image, or one of another size than `out`.
    """
    kind = extension if extension in ("jpg", "npy") else kind_of(data)
    if kind == "jpg":
        return _decode_jpeg(data, out)
    image = _raw_pixels(data) if kind == "npy" else _by_pillow(data, "npy")[0]
    if out is None:
        return image
    _check_shape(image.shape, out.shape)
    out[:] = image
    return out


def decode_reduced(data: bytes, extension: str, height: int, width: int, factor: int) -> np.ndarray:
    """An image of so many pixels, uint8 RGB: at 1, 1/2, 1/4 or 1/8 of its size, rounded up.

    A JPEG is reduced as it is decoded, by smaller transforms of its blocks. Others can only be decoded whole.

    Raises:
        ValueError: it is damaged, or of another size.
    """
    if factor == 1:
        image = decode(data, extension)
        _check_shape(image.shape, (height, width, 3))
        return image
    _check_shape((*simplejpeg.decode_jpeg_header(data)[:2], 3), (height, width, 3))
    least = -(-height // factor), -(-width // factor)
    image = simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1], min_factor=factor)
    _check_shape(image.shape, (*least, 3))
    return image


def kind_of(data: bytes) -> str | None:
    """What shards hold images as, by the first bytes: jpg, npy, png or webp; None for anything else."""
    begins = {"jpg": data.startswith(JPEG), "npy": data.startswith(NPY), "png": data.startswith(PNG)}
    return next((kind for kind, does in begins.items() if does), "webp" if WEBP.match(data) else None)


def encode(image: np.ndarray, extension: str) -> bytes:
    """The inverse of `decode`, of uint8 (height, width, 3); a jpg loses a little."""
    if extension == "jpg":
        return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=JPEG_QUALITY)
    if extension == "npy":
        return _npy_header(*image.shape[:2]) + image.tobytes()
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, extension)
    return file.getvalue()


def check_size(height: int, width: int) -> None:
    """Raises ValueError for a size that no photograph has."""
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise ValueError(f"{height} x {width} pixels: refused, more than {MAX_PIXELS:,} or none at all")


def _decode_jpeg(data: bytes, out: np.ndarray | None) -> np.ndarray:
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    if out is None:
        check_size(height, width)
    else:  # the decoder's own check of a buffer can overflow
        _check_shape((height, width, 3), out.shape)
    image = simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=out)
    return image if out is None else out


def _check_shape(found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise ValueError(f"the image is {found}, the manifest says {wanted}")


@lru_cache
def _npy_header(height: int, width: int) -> bytes:
    """What stands before the pixels in a .npy file of uint8 (height, width, 3)."""
    file = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (height, width, 3)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def _raw_pixels(data: bytes) -> np.ndarray:
    """The pixels of a .npy file, without a copy: its header must be the one that numpy writes for an RGB image."""
    header = NPY_HEADER.match(data)
    if header is None or header.end() != 10 + int.from_bytes(data[8:10], "little"):
        raise ValueError("not a .npy file of uint8 (height, width, 3)")
    column_major, *size = header.groups()
    height, width = map(int, size)
    check_size(height, width)
    if len(data) - header.end() != height * width * 3:
        raise ValueError(f"{len(data) - header.end()} bytes of pixels, the header promises {height} x {width} x 3")
    order: Literal["F", "C"] = "F" if column_major == b"True" else "C"
    return np.frombuffer(data, np.uint8, offset=header.end()).reshape((height, width, 3), order=order)


class Packable(NamedTuple):
    """One image, ready for a shard."""

    data: bytes
    pixels: np.ndarray
    """What `data` decodes to, uint8 (height, width, 3)."""
    changed: str
    """What had to be done to the file, beside another size; empty where nothing."""
    extension: str


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
            return Packable(data, pixels, changed, extension)
    else:
        from PIL import Image, ImageOps

        pixels = np.asarray(ImageOps.fit(Image.fromarray(pixels), (size, size), Image.Resampling.BICUBIC))
    encoded = encode(pixels, extension)
    return Packable(encoded, decode(encoded, extension), changed, extension)


def kept(data: bytes, most: int | None = None) -> Packable:
    """An image file's bytes as a shard of images of any size holds them: unchanged where that can be.

    JPEG, PNG and WebP of 8 bits that stand upright, and raw pixels, stay as they are, byte by byte. Of others, what was
    a JPEG becomes one again, and the rest a PNG, which loses nothing.

    Args:
        most: where given, a shorter side of more pixels is scaled down to it, by bicubic interpolation.

    Raises:
        ValueError: it is no image that can be read to its end.
    """
    kind = kind_of(data)
    pixels, changed = _pixels(data, "jpg" if kind == "jpg" else "npy")
    shorter, extension = min(pixels.shape[:2]), "jpg" if kind == "jpg" else "png"
    if most is not None and shorter > most:
        from PIL import Image

        height, width = (max(1, round(side * most / shorter)) for side in pixels.shape[:2])
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    elif kind is not None and not changed:
        return Packable(data, pixels, changed, kind)
    else:
        changed = changed or "made a PNG of RGB"
    encoded = encode(pixels, extension)
    return Packable(encoded, decode(encoded, extension), changed, extension)


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
