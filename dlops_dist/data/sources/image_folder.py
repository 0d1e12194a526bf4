"""Any tree with a folder for each class: ROOT/train/CLASS/*.jpg and ROOT/test/..., or ROOT/CLASS/*.jpg alone."""

import hashlib
import io
import re
from functools import cached_property
from pathlib import Path

import numpy as np

from dlops_dist.data.codec import check_size, encode
from dlops_dist.data.order import hold_out
from dlops_dist.data.sources.source import MAX_BYTES, Listing
from dlops_dist.errors import UserError

JPEG = (".jpg", ".jpeg")
OTHERS = (".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
LONGEST_KEY = 80
"""Bytes: with a number and its ending it must fit the 100 of a tar header."""
SPLITS = {"train": ("train", "training"), "test": ("test", "val", "valid", "validation")}
"""Folders that a split may lie in, in any case, where a tree has no others; of several, the first is taken."""


class ImageFolder:
    """Classes are the names of the folders, sorted; images lie anywhere below them.

    Args:
        path: the root.
        num_classes: only the first so many classes.
        test_fraction: part of each class that becomes the test split where the tree has none.
    """

    def __init__(self, path: Path, num_classes: int | None = None, test_fraction: float = 0.1) -> None:
        self.path, self.num_classes, self.test_fraction = path, num_classes, test_fraction
        if not path.is_dir():
            raise UserError(f"{path} is not a folder")

    @cached_property
    def _roots(self) -> dict[str, Path]:
        """The folder of each split; train alone where the classes lie at the root."""
        folders = {path.name.lower(): path for path in _folders_in(self.path)}
        if not folders or not folders.keys() <= {name for names in SPLITS.values() for name in names}:
            return {"train": self.path}
        found = {split: [folders[n] for n in names if n in folders] for split, names in SPLITS.items()}
        if not found["train"]:
            raise UserError(f"{self.path} has no folder 'train' beside {', '.join(sorted(folders))}")
        return {split: paths[0] for split, paths in found.items() if paths}

    @cached_property
    def classes(self) -> list[str]:
        names = [path.name for path in _folders_in(self._roots["train"])]
        if not names:
            raise UserError(f"{self._roots['train']} has no folders of classes in it")
        if (odd := next((name for name in names if not name.isprintable()), None)) is not None:
            raise UserError(f"{self._roots['train']}: the folder {odd!r} has a name that is not text; rename it")
        if strangers := sorted({p.name for root in self._roots.values() for p in _folders_in(root)} - set(names)):
            raise UserError(f"{self.path}: classes to test on that are not in train: {', '.join(strangers[:3])}")
        if self.num_classes is not None and self.num_classes > len(names):
            raise UserError(f"--classes {self.num_classes}: {self.path} has {len(names)} classes")
        return names[: self.num_classes]

    @cached_property
    def _files(self) -> dict[str, tuple[list[Path], np.ndarray]]:
        """Images and labels of each split, sorted by class and path."""
        files: dict[str, tuple[list[Path], np.ndarray]] = {}
        for split, root in self._roots.items():
            paths, labels = [], []
            for label, name in enumerate(self.classes):
                found = sorted(p for p in (root / name).rglob("*") if _is_image(p))
                if not found and split == "train":
                    raise UserError(f"{root / name} has no image in it: {', '.join((*JPEG, *OTHERS))}")
                paths += found
                labels += [label] * len(found)
            files[split] = paths, np.array(labels, np.int64)
        if "test" not in files:
            paths, labels_of_all = files["train"]
            for split, ids in zip(("train", "test"), hold_out(labels_of_all, self.test_fraction), strict=True):
                files[split] = [paths[i] for i in ids], labels_of_all[ids]
        if self.test_fraction and not files["test"][0]:
            raise UserError(f"{self.path} has too few images to hold some out for a test; add a folder 'test' to it")
        return files

    @cached_property
    def extension(self) -> str:
        """jpg where every image is one, as it comes; else raw pixels, which lose nothing."""
        lossy = all(path.suffix.lower() in JPEG for paths, _ in self._files.values() for path in paths)
        return "jpg" if lossy else "npy"

    @cached_property
    def splits(self) -> dict[str, Listing]:
        return {split: Listing(self._keys(split, paths), labels) for split, (paths, labels) in self._files.items()}

    def _keys(self, split: str, paths: list[Path]) -> list[str]:
        """CLASS_NAME of each image, with a number where that occurs twice; a long one is cut and hashed."""
        root, seen, keys = self._roots.get(split, self._roots["train"]), set(), []
        for number, path in enumerate(paths):
            key = re.sub(r"[^\w-]", "_", str(path.relative_to(root).with_suffix(""))).lstrip("_") or "image"
            if len(key.encode()) > LONGEST_KEY:
                digest = hashlib.sha256(key.encode()).hexdigest()[:16]
                key = key.encode()[: LONGEST_KEY - 20].decode(errors="ignore") + digest
            keys.append(f"{key}-{number}" if key in seen else key)
            seen.add(key)
        return keys

    def read(self, split: str, index: int) -> bytes:
        path = self._files[split][0][index]
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is {path.stat().st_size:,} bytes long, more than {MAX_BYTES:,}")
        data = path.read_bytes()
        return data if self.extension == "jpg" else encode(to_rgb(data, str(path)), "npy")

    def stamp(self) -> str:
        stats = ((path, path.stat()) for paths, _ in self._files.values() for path in paths)
        facts = (f"{path.relative_to(self.path)!r} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _folders_in(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in (*JPEG, *OTHERS) and not path.name.startswith(".")


def to_rgb(data: bytes, name: str) -> np.ndarray:
    """Pixels (height, width, 3) uint8 of an image in any common format."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            check_size(image.height, image.width)
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels are {image.mode}, not of 8 bits")
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} is not a readable image ({error})") from None
