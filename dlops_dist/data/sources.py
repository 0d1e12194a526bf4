"""Official dataset layouts, read as they come, into one shape: for each split a list of keys and labels, and bytes.

A source opens its files when it is first read, so it can be handed to other processes.
"""

import gzip
import io
import shutil
import tarfile
import zipfile
import zlib
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
        except (OSError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{self.path}: cannot read {name} ({error}); fetch the dataset again") from None

    def _text(self, name: str) -> str:
        try:
            return self._bytes(name).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: {name} is not text ({error.reason}); fetch the dataset again") from None

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
        wnids = sorted(self._text("wnids.txt").split())
        if self.num_classes is not None and self.num_classes > len(wnids):
            raise UserError(f"--classes {self.num_classes}: {self.path} has {len(wnids)} classes")
        return wnids[: self.num_classes]

    @cached_property
    def classes(self) -> list[str]:
        lines = self._text("words.txt").splitlines()
        words = dict(line.split("\t", 1) for line in lines if "\t" in line)
        return [f"{wnid} {words.get(wnid, '').split(',')[0].strip()}".strip() for wnid in self._wnids]

    @cached_property
    def _files(self) -> dict[str, list[tuple[str, int]]]:
        """Name and label of every image of the wanted classes, sorted by key."""
        label_of = {wnid: label for label, wnid in enumerate(self._wnids)}
        train = {name: name.split("/")[1] for name in self._names if name.startswith("train/")}
        lines = self._text("val/val_annotations.txt").splitlines()
        test = {f"val/images/{fields[0]}": fields[1] for fields in (line.split("\t") for line in lines if "\t" in line)}
        missing = set(test) - set(self._names)
        if missing:
            names = f"{len(missing)} images of val_annotations.txt are missing, {min(missing)} first"
            raise UserError(f"{self.path}: {names}; fetch the dataset again")
        return {
            split: sorted(
                ((name, label_of[wnid]) for name, wnid in wnid_of.items() if wnid in label_of),
                key=lambda file: Path(file[0]).stem,
            )
            for split, wnid_of in (("train", train), ("test", test))
        }

    @cached_property
    def splits(self) -> dict[str, Listing]:
        return {
            split: Listing([Path(name).stem for name, _ in files], np.array([label for _, label in files], np.int64))
            for split, files in self._files.items()
        }

    def read(self, split: str, index: int) -> bytes:
        return self._bytes(self._files[split][index][0])


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
    def _all_classes(self) -> list[str]:
        try:
            return (self.path / "class_names.txt").read_text().split()
        except OSError as error:
            raise UserError(f"{self.path} is not STL-10: {error.strerror}: class_names.txt") from None

    @cached_property
    def classes(self) -> list[str]:
        if self.num_classes is not None and self.num_classes > len(self._all_classes):
            raise UserError(f"--classes {self.num_classes}: {self.path} has {len(self._all_classes)} classes")
        return self._all_classes[: self.num_classes]

    @cached_property
    def _pixels(self) -> dict[str, np.ndarray]:
        arrays = {}
        for split in ("train", "test", "unlabeled"):
            file = self.path / f"{split}_X.bin"
            if file.is_file():
                if not file.stat().st_size or file.stat().st_size % (3 * self.size**2):
                    raise UserError(f"{file} is cut off: not a whole number of 96x96 images; fetch the dataset again")
                arrays[split] = np.memmap(file, np.uint8, "r").reshape(-1, 3, self.size, self.size)
        return arrays

    @cached_property
    def _labels(self) -> dict[str, np.ndarray]:
        """Of every image, from 0; UNLABELED where there is no file of labels."""
        labels = {}
        for split, pixels in self._pixels.items():
            file = self.path / f"{split}_y.bin"
            if not file.is_file() and split != "unlabeled":
                raise UserError(f"{self.path}: {file.name} is missing; fetch the dataset again")
            if not file.is_file():
                labels[split] = np.full(len(pixels), UNLABELED, np.int64)
                continue
            labels[split] = np.fromfile(file, np.uint8).astype(np.int64) - 1
            in_range = ((labels[split] >= 0) & (labels[split] < len(self._all_classes))).all()
            if len(labels[split]) != len(pixels) or not in_range:
                wanted = f"{len(pixels)} labels from 1 to {len(self._all_classes)}"
                raise UserError(f"{file} does not match {split}_X.bin: {wanted} expected; fetch the dataset again")
        return labels

    @cached_property
    def _kept(self) -> dict[str, np.ndarray]:
        """Where the images of the wanted classes stand in the files."""
        return {split: np.flatnonzero(labels < len(self.classes)) for split, labels in self._labels.items()}

    @cached_property
    def splits(self) -> dict[str, Listing]:
        return {
            split: Listing([f"{split}-{i:06d}" for i in kept], self._labels[split][kept])
            for split, kept in self._kept.items()
        }

    def read(self, split: str, index: int) -> bytes:
        image = self._pixels[split][self._kept[split][index]].transpose(2, 1, 0)  # stored channel, column, row
        file = io.BytesIO()
        np.save(file, np.ascontiguousarray(image))
        return file.getvalue()


def unpack_stl10(archive: Path, folder: Path) -> Path:
    """The wanted members of stl10_binary.tar.gz, written into folder/stl10_binary. Nothing else is extracted.

    Files get their names only once the whole archive was read and its checksum was found right.
    """
    out = folder / "stl10_binary"
    out.mkdir(parents=True, exist_ok=True)
    partials: dict[Path, Path] = {}
    try:
        with gzip.open(archive) as unzipped, tarfile.open(fileobj=unzipped, mode="r|") as tar:
            for member in tar:
                name = Path(member.name).name
                wanted = member.isfile() and name.endswith((".bin", ".txt"))
                stream = tar.extractfile(member) if wanted else None
                if stream is not None:
                    partials[out / name] = out / f".{name}.partial"
                    with partials[out / name].open("wb") as file:
                        shutil.copyfileobj(stream, file, 1 << 22)
            while unzipped.read(1 << 22):  # to the end, where the checksum stands
                pass
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
        raise UserError(f"{archive} is not a whole tar.gz file ({_first_line(error)}); fetch it again") from None
    for path, partial in partials.items():
        partial.rename(path)
    return out


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
