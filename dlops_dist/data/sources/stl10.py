"""STL-10 as it is published: stl10_binary.tar.gz, or the folder it unpacks to."""

import errno
import gzip
import shutil
import tarfile
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np

from dlops_dist.data.images import encode
from dlops_dist.data.index import UNLABELED
from dlops_dist.data.sources.source import Listing, is_litter
from dlops_dist.errors import UserError, first_line
from dlops_dist.files import PARTIAL, locked

MAX_FOLDS = 31
LARGEST = {"_X.bin": 2**33, ".bin": 2**24, ".txt": 2**24}
"""Bytes that a member of the archive may unpack to, by the end of its name; other members are passed over."""


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
        """Everything found out so far, but no open file."""
        return {name: value for name, value in self.__dict__.items() if name != "_pixels"}

    @cached_property
    def _all_classes(self) -> list[str]:
        try:
            return (self.path / "class_names.txt").read_text("utf-8-sig").split()
        except OSError as error:
            raise UserError(f"{self.path} is not STL-10: {error.strerror}: class_names.txt") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: class_names.txt is not text ({error.reason})") from None

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
    def _folds(self) -> np.ndarray:
        """(N,) int32 of all training images, from fold_indices.txt: a line of image numbers for each fold."""
        file, number = self.path / "fold_indices.txt", len(self._pixels["train"])
        folds = np.zeros(number, np.int32)
        if not file.is_file():
            return folds
        try:
            lines = [np.array(line.split(), np.int64) for line in file.read_text().splitlines()]
        except (ValueError, OverflowError) as error:
            raise UserError(f"{file} is not lists of numbers ({error}); fetch the dataset again") from None
        if len(lines) > MAX_FOLDS or any(((ids < 0) | (ids >= number)).any() for ids in lines):
            wanted = f"at most {MAX_FOLDS} lines of numbers below {number}"
            raise UserError(f"{file} does not match train_X.bin: {wanted} expected; fetch the dataset again")
        for fold, ids in enumerate(lines):
            folds[ids] |= 1 << fold
        return folds

    @cached_property
    def splits(self) -> dict[str, Listing]:
        return {
            split: Listing(
                [f"{split}-{i:06d}" for i in kept],
                self._labels[split][kept],
                self._folds[kept] if split == "train" else None,
            )
            for split, kept in self._kept.items()
        }

    def read(self, split: str, index: int) -> bytes:
        image = self._pixels[split][self._kept[split][index]].transpose(2, 1, 0)  # stored channel, column, row
        return encode(image, self.extension)

    def name(self, split: str, index: int) -> str:
        return f"{split}_X.bin, image {self._kept[split][index]}"

    def stamp(self) -> str:
        stats = ((path.name, path.stat()) for path in sorted(self.path.iterdir()))
        return " ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)


def unpack_stl10(archive: Path, folder: Path) -> Path:
    """The wanted members of stl10_binary.tar.gz, in folder/ARCHIVE.unpacked; nothing else is extracted.

    Unpacked once: the folder gets its name only when the whole archive was read and its checksum was found right.
    """
    out = folder / f"{archive.name}.unpacked"
    partial = folder / f".{out.name}{PARTIAL}"
    folder.mkdir(parents=True, exist_ok=True)
    stat, marker = archive.stat(), out / ".whole"
    facts = f"{stat.st_size} {stat.st_mtime_ns}"
    with locked(folder, "unpacked into"):
        if marker.is_file() and marker.read_text() == facts:
            return out
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _unpack(archive, partial)
            (partial / marker.name).write_text(facts)
        except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise UserError(f"{out}: no space left to unpack {archive} to; make room or move it") from None
            raise UserError(f"{archive} is not a whole tar.gz file ({first_line(error)}); fetch it again") from None
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    return out


def _unpack(archive: Path, out: Path) -> None:
    out.mkdir()
    with gzip.open(archive) as unzipped, tarfile.open(fileobj=unzipped, mode="r|") as tar:
        for member in tar:
            stream = tar.extractfile(member) if _is_wanted(member) else None
            if stream is not None:
                with (out / Path(member.name).name).open("wb") as file:
                    shutil.copyfileobj(stream, file, 1 << 22)
        while unzipped.read(1 << 22):  # to the end, where the checksum stands
            pass


def _is_wanted(member: tarfile.TarInfo) -> bool:
    """Whether it is one of the dataset's files. Raises TarError for one of an absurd size."""
    allowed = next((size for end, size in LARGEST.items() if member.name.endswith(end)), None)
    if allowed is None or not member.isfile() or is_litter(member.name):
        return False
    if member.size > allowed:
        raise tarfile.TarError(f"{member.name} claims {member.size:,} bytes, more than {allowed:,}")
    return True
