"""`shapes`: procedural images that any machine makes in seconds, written in the layouts of the real datasets.

Each image shows one figure at a random place, size, angle and pair of colours, on a gradient with noise and
smaller distracting strokes. Colour and place say nothing about the class, so a linear model stays near chance
while a small ResNet learns it.
"""

import zipfile
from pathlib import Path

import numpy as np

from dlops_dist.data.keys import key

CLASSES = ("disk", "ring", "square", "frame", "triangle", "star", "cross", "crescent", "stripes", "checker")

STL10_SIZE = 96


def draw(label: int, seed: int, size: int) -> np.ndarray:
    """One image (size, size, 3) uint8 of the class; a pure function of its arguments."""
    rng = np.random.Generator(np.random.Philox(key=key(seed, label, "shapes")))
    grid = (np.mgrid[0:size, 0:size] + 0.5) / size
    center, radius, angle = rng.uniform(0.38, 0.62, 2), rng.uniform(0.24, 0.4), rng.uniform(-0.6, 0.6)
    y, x = (grid[0] - center[0]) / radius, (grid[1] - center[1]) / radius
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x

    background, figure = rng.uniform(0.05, 0.95, (2, 3))
    while np.abs(background - figure).max() < 0.25:  # must be visible
        figure = rng.uniform(0.05, 0.95, 3)
    tilt = rng.uniform(-0.3, 0.3, (2, 3))
    image = background + tilt[0] * (grid[0][..., None] - 0.5) + tilt[1] * (grid[1][..., None] - 0.5)
    for _ in range(3):
        image = _stroke(image, grid, rng)
    image = np.where(_inside(CLASSES[label], u, v)[..., None], figure, image)
    image += rng.normal(0, 0.03, image.shape)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def _stroke(image: np.ndarray, grid: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A short line of any colour: a distraction."""
    at, angle = rng.uniform(0, 1, 2), rng.uniform(0, np.pi)
    along = (grid[0] - at[0]) * np.sin(angle) + (grid[1] - at[1]) * np.cos(angle)
    across = (grid[0] - at[0]) * np.cos(angle) - (grid[1] - at[1]) * np.sin(angle)
    return np.where(((np.abs(along) < 0.12) & (np.abs(across) < 0.02))[..., None], rng.uniform(0, 1, 3), image)


def _inside(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where a figure of radius about 1 covers the plane."""
    r, box = np.hypot(u, v), np.maximum(np.abs(u), np.abs(v))
    match name:
        case "disk":
            return r < 0.9
        case "ring":
            return (r < 1.0) & (r > 0.6)
        case "square":
            return box < 0.8
        case "frame":
            return (box < 0.9) & (box > 0.55)
        case "triangle":
            return (v > -0.6) & (np.abs(u) * 1.8 + v < 1.1)
        case "star":
            return r < 0.62 + 0.38 * np.cos(5 * np.arctan2(v, u))
        case "cross":
            return (box < 0.95) & (np.minimum(np.abs(u), np.abs(v)) < 0.28)
        case "crescent":
            return (r < 0.95) & (np.hypot(u - 0.45, v) > 0.75)
        case "stripes":
            return (box < 0.85) & (np.floor((u + 1) * 2.6) % 2 == 0)
        case _:
            return (box < 0.85) & ((np.floor((u + 1) * 2.4) + np.floor((v + 1) * 2.4)) % 2 == 0)


def write_tiny_imagenet(path: Path, train_per_class: int, test_per_class: int, size: int = 64) -> None:
    """A zip in Tiny ImageNet's layout: wnids.txt, words.txt, train/<wnid>/images, val with its annotations."""
    import simplejpeg

    wnids = [f"n{index:08d}" for index in range(len(CLASSES))]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("shapes/wnids.txt", "".join(f"{w}\n" for w in wnids))
        archive.writestr("shapes/words.txt", "".join(f"{w}\t{n}\n" for w, n in zip(wnids, CLASSES, strict=True)))
        for label, wnid in enumerate(wnids):
            for i in range(train_per_class):
                image = draw(label, i, size)
                name = f"shapes/train/{wnid}/images/{wnid}_{i}.JPEG"
                archive.writestr(name, simplejpeg.encode_jpeg(image, quality=90))
        annotations = []
        for i in range(test_per_class * len(CLASSES)):
            label = i % len(CLASSES)
            image = draw(label, train_per_class + i, size)
            archive.writestr(f"shapes/val/images/val_{i}.JPEG", simplejpeg.encode_jpeg(image, quality=90))
            annotations.append(f"val_{i}.JPEG\t{wnids[label]}\t0\t0\t{size - 1}\t{size - 1}\n")
        archive.writestr("shapes/val/val_annotations.txt", "".join(annotations))


def write_stl10(folder: Path, train_per_class: int, test_per_class: int, num_unlabeled: int) -> None:
    """The binary files of STL-10's layout: images (N, 3, columns, rows) uint8, labels from 1, class names, folds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "class_names.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    first = 0
    for split, number in (("train", train_per_class), ("test", test_per_class)):
        labels = np.tile(np.arange(len(CLASSES)), number)
        (folder / f"{split}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
        _write_images(folder / f"{split}_X.bin", labels, first)
        first += len(labels)
    _write_images(folder / "unlabeled_X.bin", np.arange(num_unlabeled) % len(CLASSES), first)
    ids = np.arange(train_per_class * len(CLASSES))
    folds = np.array_split(ids, 10)
    (folder / "fold_indices.txt").write_text("".join(" ".join(map(str, fold)) + "\n" for fold in folds))


def _write_images(path: Path, labels: np.ndarray, first_seed: int) -> None:
    with path.open("wb") as file:
        for i, label in enumerate(labels):
            file.write(draw(int(label), first_seed + i, STL10_SIZE).transpose(2, 1, 0).tobytes())
