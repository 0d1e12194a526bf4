"""Bytes of an image into pixels, and back. Nothing is unpickled; what claims an absurd size is refused unread."""

import io
import re
from functools import lru_cache
from typing import Literal

import numpy as np
import simplejpeg

MAX_PIXELS = 2**26
"""Of one image: more is taken for a decompression bomb."""
NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\0..\{'descr': '\|u1', 'fortran_order': (True|False), 'shape': \((\d{1,9}), (\d{1,9}), 3\), \} *\n",
    re.DOTALL,
)
"""Version 1.0, read by its letters: numpy's own reader evaluates it as Python."""
JPEG_QUALITY = 95
"""Of images that had to be resized."""


def decode(data: bytes, extension: str, out: np.ndarray | None = None) -> np.ndarray:
    """One image, uint8 (height, width, 3), RGB; into `out` where given.

    Args:
        extension: jpg, or npy for raw pixels.

    Raises:
        ValueError: anything else, or an image of another size than `out`.
    """
    if extension == "jpg":
        return _decode_jpeg(data, out)
    image = _raw_pixels(data)
    if out is None:
        return image
    if image.shape != out.shape:
        raise ValueError(f"the image is {image.shape}, the manifest says {out.shape}")
    out[:] = image
    return out


def encode(image: np.ndarray, extension: str) -> bytes:
    """The inverse of `decode`, of uint8 (height, width, 3); a jpg loses a little."""
    if extension == "jpg":
        return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=JPEG_QUALITY)
    return _npy_header(*image.shape[:2]) + image.tobytes()


def check_size(height: int, width: int) -> None:
    """Raises ValueError for a size that no photograph has."""
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise ValueError(f"{height} x {width} pixels: refused, more than {MAX_PIXELS:,} or none at all")


def _decode_jpeg(data: bytes, out: np.ndarray | None) -> np.ndarray:
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    if out is None:
        check_size(height, width)
    elif (height, width, 3) != out.shape:  # the decoder's own check of a buffer can overflow
        raise ValueError(f"the image is {(height, width, 3)}, the manifest says {out.shape}")
    image = simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=out)
    return image if out is None else out


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
