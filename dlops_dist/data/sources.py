"""Official dataset layouts, read as they come, into one shape: for each split a list of keys and labels, and bytes.

A source opens its files when it is first read, so it can be handed to other processes.
"""

import io
import tarfile
import zipfile
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from dlops_dist.errors import UserError

UNLABELED = -1


class Listing(NamedTuple):
    """The samples of a split, sorted by key."""

    keys: list[str]
    labels: np.ndarray
    """int64; UNLABELED where there is none."""


class Source(Protocol):
    """A dataset to pack."""

    extension: str
    """Of the image in a shard: jpg (as it comes) or npy (raw uint8, height x width x 3)."""

    @property
    def classes(self) -> list[str]: ...

    @property
    def splits(self) -> dict[str, Listing]: ...

    def read(self, split: str, index: int) -> bytes:
        """The image of the index-th sample of a split, as it stands in a shard."""
        ...


class TinyImageNet:
    """tiny-imagenet-200.zip, or the folder it unpacks to. Its official `val` is our test split.

    Args:
        path: the zip file, or the folder that holds wnids.txt.
        num_classes: only the first so many classes, by sorted wnid.
    """

    extension = "jpg"

    def __init__(self, path: Path, num_classes: int | None = None) -> None:
        self.path, self.num_classes = path, num_classes

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "num_classes": self.num_classes}

    @cached_property
    def _archive(self) -> zipfile.ZipFile | None:
        if self.path.is_dir():
            return None
        try:
            return zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path} is not a readable zip file ({error}); fetch it again") from None

    @cached_property
    def _root(self) -> str:
        """What stands before wnids.txt: the archive has one folder at its top."""
        if self._archive is None:
            found = [p for p in (self.path, *self.path.iterdir()) if (p / "wnids.txt").is_file()]
            roots = [f"{p}/" for p in found]
        else:
            roots = [name[: -len("wnids.txt")] for name in self._archive.namelist() if name.endswith("wnids.txt")]
        if not roots:
            raise UserError(f"{self.path} is not Tiny ImageNet: no wnids.txt in it")
        return roots[0]

    def _bytes(self, name: str) -> bytes:
        try:
            if self._archive is None:
                return Path(self._root + name).read_bytes()
            return self._archive.read(self._root + name)
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path}: cannot read {name} ({error}); fetch the dataset again") from None

    @cached_property
    def _names(self) -> list[str]:
        """Every image, below the root."""
        if self._archive is None:
            root = Path(self._root)
            paths = (path.relative_to(root).as_posix() for path in root.rglob("*.JPEG"))
            return list(paths)
        start = len(self._root)
        return [n[start:] for n in self._archive.namelist() if n.startswith(self._root) and n.endswith(".JPEG")]

    @cached_property
    def _wnids(self) -> list[str]:
        wnids = sorted(self._bytes("wnids.txt").decode().split())
        if self.num_classes is not None and self.num_classes > len(wnids):
            raise UserError(f"--classes {self.num_classes}: {self.path} has {len(wnids)} classes")
        return wnids[: self.num_classes]

    @cached_property
    def classes(self) -> list[str]:
        words = dict(line.split("\t", 1) for line in self._bytes("words.txt").decode().splitlines())
        return [f"{wnid} {words.get(wnid, '').split(',')[0].strip()}".strip() for wnid in self._wnids]

    @cached_property
    def splits(self) -> dict[str, Listing]:
        label_of = {wnid: label for label, wnid in enumerate(self._wnids)}
        train = [n for n in self._names if n.startswith("train/") and n.split("/")[1] in label_of]
        annotations = (line.split("\t") for line in self._bytes("val/val_annotations.txt").decode().splitlines())
        test_wnid = {f"val/images/{fields[0]}": fields[1] for fields in annotations}
        test = [n for n, wnid in test_wnid.items() if wnid in label_of]
        missing = set(test) - set(self._names)
        if missing:
            raise UserError(
                f"{self.path}: {len(missing)} images of val_annotations.txt are missing, {min(missing)} first"
            )
        train.sort(key=lambda name: Path(name).stem)
        test.sort(key=lambda name: Path(name).stem)
        self._files = {"train": train, "test": test}
        return {
            "train": Listing([Path(n).stem for n in train], np.array([label_of[n.split("/")[1]] for n in train])),
            "test": Listing([Path(n).stem for n in test], np.array([label_of[test_wnid[n]] for n in test])),
        }

    def read(self, split: str, index: int) -> bytes:
        self.splits  # noqa: B018  fills _files
        return self._bytes(self._files[split][index])


class STL10:
    """stl10_binary/: uint8 images (N, 3, columns, rows), labels from 1, unlabeled images, class names.

    Args:
        path: the folder, or the one that holds it.
        num_classes: only the first so many classes.
    """

    extension = "npy"
    size = 96

    def __init__(self, path: Path, num_classes: int | None = None) -> None:
        self.path = path / "stl10_binary" if (path / "stl10_binary").is_dir() else path
        self.num_classes = num_classes
        if not (self.path / "train_X.bin").is_file():
            raise UserError(f"{path} is not STL-10: no train_X.bin in it")

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "num_classes": self.num_classes}

    @cached_property
    def classes(self) -> list[str]:
        return (self.path / "class_names.txt").read_text().split()[: self.num_classes]

    @cached_property
    def _pixels(self) -> dict[str, np.ndarray]:
        arrays = {}
        for split in ("train", "test", "unlabeled"):
            file = self.path / f"{split}_X.bin"
            if file.is_file():
                if file.stat().st_size % (3 * self.size**2):
                    raise UserError(f"{file} is cut off: not a whole number of 96x96 images; fetch the dataset again")
                arrays[split] = np.memmap(file, np.uint8, "r").reshape(-1, 3, self.size, self.size)
        return arrays

    @cached_property
    def splits(self) -> dict[str, Listing]:
        listings = {}
        for split, pixels in self._pixels.items():
            labels = np.full(len(pixels), UNLABELED, np.int64)
            labels_file = self.path / f"{split}_y.bin"
            if labels_file.is_file():
                labels = np.fromfile(labels_file, np.uint8).astype(np.int64) - 1
                if len(labels) != len(pixels) or labels.min() < 0:
                    raise UserError(f"{labels_file} does not match {split}_X.bin: {len(labels)} labels from 1 expected")
            self._kept[split] = kept = np.flatnonzero(labels < len(self.classes))
            listings[split] = Listing([f"{split}-{i:06d}" for i in kept], labels[kept])
        return listings

    @cached_property
    def _kept(self) -> dict[str, np.ndarray]:
        return {}

    def read(self, split: str, index: int) -> bytes:
        self.splits  # noqa: B018  fills _kept
        image = self._pixels[split][self._kept[split][index]].transpose(2, 1, 0)  # stored channel, column, row
        file = io.BytesIO()
        np.save(file, np.ascontiguousarray(image))
        return file.getvalue()


def unpack_stl10(archive: Path, folder: Path) -> Path:
    """The wanted members of stl10_binary.tar.gz, written into folder/stl10_binary. Nothing else is extracted."""
    out = folder / "stl10_binary"
    out.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                if not member.isfile() or not name.endswith((".bin", ".txt")) or (out / name).exists():
                    continue
                stream = tar.extractfile(member)
                partial = out / f".{name}.partial"
                with partial.open("wb") as file:
                    while stream and (block := stream.read(1 << 22)):
                        file.write(block)
                partial.rename(out / name)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"{archive} is not a readable tar.gz file ({error}); fetch it again") from None
    return out
