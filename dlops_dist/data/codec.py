"""Bytes of an image into pixels, and back. Nothing is unpickled; what claims an absurd size is refused unread."""

import io
from functools import lru_cache

import numpy as np

MAX_PIXELS = 2**26
"""Of one image: more is taken for a decompression bomb."""
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
        import simplejpeg

        return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=JPEG_QUALITY)
    return _npy_header(*image.shape[:2]) + image.tobytes()


def check_size(height: int, width: int) -> None:
    """Raises ValueError for a size that no photograph has."""
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise ValueError(f"{height} x {width} pixels: refused, more than {MAX_PIXELS:,} or none at all")


def _decode_jpeg(data: bytes, out: np.ndarray | None) -> np.ndarray:
    import simplejpeg

    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    check_size(height, width)
    if out is not None and (height, width, 3) != out.shape:  # the decoder's own check of a buffer can overflow
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
    """The pixels of a .npy file, without a copy: its header must promise exactly the bytes that follow."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f".npy version {version} is not known")
    shape, column_major, dtype = read_header[version](file)
    if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3:
        raise ValueError(f"{dtype} {shape} is not an uint8 RGB image")
    check_size(*shape[:2])
    if len(data) - file.tell() != shape[0] * shape[1] * 3:
        raise ValueError(f"{len(data) - file.tell()} bytes of pixels, the header promises {shape}")
    return np.frombuffer(data, np.uint8, offset=file.tell()).reshape(shape, order="F" if column_major else "C")
