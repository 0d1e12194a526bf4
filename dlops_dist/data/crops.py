"""The part of an image that is seen: chosen by the sample's own draws, or the middle, and scaled to one size.

It depends on the image's own bytes, size and draws alone, to the last bit, whatever else is read beside it.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from dlops_dist.config import Augment
from dlops_dist.data.images import decode_reduced, kept, kind_of
from dlops_dist.data.shards import Manifest, Split

ATTEMPTS = 10
"""Parts that are drawn until one fits into the image."""
NUM_DRAWS = 2 * ATTEMPTS + 3
"""Random numbers for a part: area and aspect of each attempt, then its place, and whether it is mirrored."""
FACTORS = (8, 4, 2)
"""By which JPEGs are reduced as they are decoded. Other eighths have no fast transform."""


class Box(NamedTuple):
    """A part of an image, in whole pixels."""

    top: int
    left: int
    height: int
    width: int


class Crop(NamedTuple):
    """Which part of each image is seen, at which size."""

    size: int
    """Pixels of each side."""
    center: float
    """Side of the middle that is seen without draws, as a part of the shorter one."""
    area: tuple[float, float] = (1.0, 1.0)
    aspect: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    """Mirror every second random part, left to right."""

    def box(self, height: int, width: int, draws: Sequence[float] | None = None) -> Box:
        """Of an image of this size: a random part, by NUM_DRAWS uniform numbers in [0, 1), or its middle."""
        return _middle(height, width, self.center) if draws is None else _random_box(height, width, draws, self)

    def mirrors(self, draws: Sequence[float] | None) -> bool:
        return self.flip and draws is not None and draws[-1] < 0.5


def crop_of(chosen: Augment) -> Crop | None:
    """None where images are seen as they are packed."""
    if chosen.size is None:
        return None
    area = chosen.resized_crop or 1.0, chosen.largest_crop
    return Crop(chosen.size, chosen.center_crop, area, chosen.aspect, chosen.flip)


def _middle(height: int, width: int, part: float) -> Box:
    side = max(1, round(part * min(height, width)))
    return Box((height - side) // 2, (width - side) // 2, side, side)


def _random_box(height: int, width: int, draws: Sequence[float], crop: Crop) -> Box:
    """Area uniform, aspect uniform in its logarithm, place uniform; the first of some that fits, else the middle.

    As torchvision's RandomResizedCrop (after Szegedy et al. 2015, Going Deeper with Convolutions, section 6).
    """
    least, most = crop.aspect
    *attempts, y, x, _ = draws
    for u, v in zip(attempts[::2], attempts[1::2], strict=True):
        area = height * width * _between(*crop.area, u)
        aspect = math.exp(_between(math.log(least), math.log(most), v))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(y * (height - h + 1)), int(x * (width - w + 1)), h, w)
    h, w = min(height, max(1, round(width / least))), min(width, max(1, round(height * most)))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def _between(low: float, high: float, uniform: float) -> float:
    return low + (high - low) * uniform


def seen(
    data: bytes, extension: str, height: int, width: int, box: Box, size: int, mirrored: bool = False
) -> np.ndarray:  # fmt: skip
    """A part of an image of (height, width), scaled to uint8 (size, size, 3), bilinearly and without aliasing.

    A JPEG is first reduced by 2, 4 or 8 as it is decoded, where the part stays as large as what is wanted. The part
    then lies on the pixels of what is left: its edges move by half of one at most.

    Raises:
        ValueError: the image is damaged, or of another size.
    """
    shorter, is_jpeg = min(box.height, box.width), kind_of(data) == "jpg"
    by = next((factor for factor in FACTORS if is_jpeg and shorter >= factor * size), 1)
    pixels = decode_reduced(data, extension, height, width, by)
    edges = box.top, box.top + box.height, box.left, box.left + box.width
    top, bottom, left, right = ((edge + by // 2) // by for edge in edges)
    return scaled(pixels[top:bottom, left:right], size, mirrored)


def scaled(pixels: np.ndarray, size: int, mirrored: bool = False) -> np.ndarray:
    """uint8 (h, w, 3) as uint8 (size, size, 3): by a triangle as wide as a pixel of the result, in whole numbers."""
    pixels = pixels if pixels.flags.writeable else pixels.copy()  # torch warns of what it must not change
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # strides of channels-last: others cost a transposition
    if pixels.shape != (size, size, 3):
        image = F.interpolate(image, (size, size), mode="bilinear", antialias=True)
    image = image[0].permute(1, 2, 0)
    return (image.flip(1) if mirrored else image).numpy()


def middle_of(data: bytes, crop: Crop) -> np.ndarray:
    """What is seen of an image file without draws, uint8 (size, size, 3), as if it were packed as it is.

    Raises:
        ValueError: it is no image that can be read to its end.
    """
    image = kept(data)
    height, width = image.pixels.shape[:2]
    return seen(image.data, image.extension, height, width, crop.box(height, width), crop.size)


class Cropped(Split):
    """A split of images of any size, read at one: a part of each."""

    def __init__(self, folder: Path, manifest: Manifest, name: str, crop: Crop) -> None:
        super().__init__(folder, manifest, name)
        self.crop = crop

    @property
    def size(self) -> tuple[int, int]:
        return self.crop.size, self.crop.size

    def read(self, ids: np.ndarray, draws: np.ndarray | None = None) -> np.ndarray:
        """uint8 (n, size, size, 3), RGB: by draws (n, NUM_DRAWS) a random part of each image, else its middle."""
        images = np.empty((len(ids), *self.size, 3), np.uint8)
        sizes, drawn = self.sizes(ids), [None] * len(ids) if draws is None else draws.tolist()

        def take(place: int, data: bytes) -> None:
            height, width = sizes[place]
            box, mirrored = self.crop.box(height, width, drawn[place]), self.crop.mirrors(drawn[place])
            images[place] = seen(data, self.manifest.extension, height, width, box, self.crop.size, mirrored)

        self.each(ids, take)
        return images


def opened(folder: Path, manifest: Manifest, name: str, chosen: Augment) -> Split:
    """A split as a run with these settings sees it."""
    crop = crop_of(chosen)
    return Split(folder, manifest, name) if crop is None else Cropped(folder, manifest, name, crop)
