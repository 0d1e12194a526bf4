"""Tiny ImageNet-200 as it is published: tiny-imagenet-200.zip, or the folder it unpacks to."""

import hashlib
import lzma
import zipfile
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np

from dlops_dist.data.sources.source import MAX_BYTES, Listing
from dlops_dist.errors import UserError

DAMAGE = (
    OSError, KeyError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip
"""What reading a member of a damaged archive raises."""


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
        """Everything found out so far, but no open file."""
        return {name: value for name, value in self.__dict__.items() if name != "_archive"}

    @cached_property
    def _archive(self) -> zipfile.ZipFile | None:
        if self.path.is_dir():
            return None
        try:
            archive = zipfile.ZipFile(self.path)
        except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path} is not a readable zip file ({error}); fetch it again") from None
        for member in archive.infolist():
            _refuse_odd(self.path, member)
        return archive

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
        except DAMAGE as error:
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
                key=lambda file: _key(file[0]),
            )
            for split, wnid_of in (("train", train), ("test", test))
        }

    @cached_property
    def splits(self) -> dict[str, Listing]:
        return {
            split: Listing([_key(name) for name, _ in files], np.array([label for _, label in files], np.int64))
            for split, files in self._files.items()
        }

    def read(self, split: str, index: int) -> bytes:
        return self._bytes(self._files[split][index][0])

    def name(self, split: str, index: int) -> str:
        return self._files[split][index][0]

    def stamp(self) -> str:
        if self._archive is not None:  # checksums of every member
            facts = [f"{m.filename!r} {m.file_size} {m.CRC}" for m in self._archive.infolist()]
            facts.append(str(self.path.stat().st_mtime_ns))
        else:
            stats = ((name, Path(self._root + name).stat()) for name in sorted(self._names))
            facts = [f"{name!r} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _key(name: str) -> str:
    """The file's name, without folders and ending."""
    return name.rpartition("/")[2].rpartition(".")[0]


def _refuse_odd(path: Path, member: zipfile.ZipInfo) -> None:
    """Nothing is ever extracted, so such members do no harm; an archive that has them is not what it says it is."""
    parts = member.filename.replace("\\", "/").split("/")
    if ".." in parts or not parts[0]:
        raise UserError(f"{path}: member {member.filename!r} points outside of the archive; fetch the dataset again")
    if member.file_size > MAX_BYTES:
        claimed = f"member {member.filename!r} claims {member.file_size:,} bytes"
        raise UserError(f"{path}: {claimed}, more than {MAX_BYTES:,}: a decompression bomb? Fetch the dataset again")
