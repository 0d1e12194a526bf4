"""Tiny ImageNet-200: tiny-imagenet-200.zip as it is published, or the folder it unpacks to.

Images of val may have been sorted into val/CLASS/ or val/CLASS/images/, as many do: the samples stay the same.
"""

import hashlib
import lzma
import zipfile
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np

from dlops_dist.data.sources.source import MAX_BYTES, Listing, is_litter
from dlops_dist.errors import UserError

DAMAGE = (
    OSError, KeyError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip
"""What reading a member of a damaged archive raises."""
ANNOTATIONS = "val/val_annotations.txt"


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
            names = (name for name in self._archive.namelist() if name.endswith("wnids.txt") and not is_litter(name))
            roots = [name.removesuffix("wnids.txt") for name in names]
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
            return self._bytes(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: {name} is not text ({error.reason}); fetch the dataset again") from None

    @cached_property
    def _below_root(self) -> list[str]:
        """Every file, but what systems leave."""
        root = self._root
        if self._archive is None:
            names = [path.relative_to(root).as_posix() for path in Path(root).rglob("*")]
        else:
            names = [name.removeprefix(root) for name in self._archive.namelist() if name.startswith(root)]
        return [name for name in names if not is_litter(name)]

    @cached_property
    def _names(self) -> list[str]:
        """Every image, below the root."""
        return [name for name in self._below_root if name.lower().endswith((".jpeg", ".jpg"))]

    @cached_property
    def _all_wnids(self) -> set[str]:
        return set(self._text("wnids.txt").split())

    @cached_property
    def _wnids(self) -> list[str]:
        wnids = sorted(self._all_wnids)
        if self.num_classes is not None and self.num_classes > len(wnids):
            raise UserError(f"--classes {self.num_classes}: {self.path} has {len(wnids)} classes")
        return wnids[: self.num_classes]

    @cached_property
    def classes(self) -> list[str]:
        lines = self._text("words.txt").splitlines()
        words = dict(line.split("\t", 1) for line in lines if "\t" in line)
        return [f"{wnid} {words.get(wnid, '').split(',')[0].strip()}".strip() for wnid in self._wnids]

    @cached_property
    def _annotated(self) -> dict[str, str]:
        """The class of each image of val, by the name of its file; empty where only its folder tells it."""
        if ANNOTATIONS not in self._below_root and any(_folder(name) in self._all_wnids for name in self._in("val")):
            return {}
        lines = self._text(ANNOTATIONS).splitlines()
        return {file: wnid for file, wnid, *_ in (line.split("\t") for line in lines if "\t" in line)}

    def _in(self, folder: str) -> list[str]:
        return sorted(name for name in self._names if name.startswith(f"{folder}/"))

    def _wnids_of_val(self) -> dict[str, str]:
        """The class of each image of val, wherever it lies there; of copies of an annotated one, the first is taken."""
        annotated, wnid_of, seen = self._annotated, dict[str, str](), set[str]()
        classes = self._all_wnids | {_folder(name) for name in self._in("train")}
        for name in self._in("val"):
            folder, file = _folder(name), name.rpartition("/")[2]
            if not annotated and folder not in classes:
                why = f"lies in no folder of a class, and no {ANNOTATIONS} tells its class"
                raise UserError(f"{self.path}: {name} {why}; fetch the dataset again")
            wnid = annotated.get(file, folder)
            if folder in self._all_wnids and wnid != folder:
                raise UserError(
                    f"{self.path}: {name} is {wnid} by {ANNOTATIONS}, not {folder}; fetch the dataset again"
                )
            if file not in annotated or file not in seen:
                wnid_of[name] = wnid
            seen.add(file)
        if missing := annotated.keys() - seen:
            names = f"{len(missing)} images of {ANNOTATIONS} are missing, val/images/{min(missing)} first"
            raise UserError(f"{self.path}: {names}; fetch the dataset again")
        return wnid_of

    @cached_property
    def _files(self) -> dict[str, list[tuple[str, str, int]]]:
        """Key, name and label of every image of the wanted classes, sorted by key."""
        label_of, files = {wnid: label for label, wnid in enumerate(self._wnids)}, {}
        train = {name: _folder(name) for name in self._in("train")}
        for split, wnid_of in {"train": train, "test": self._wnids_of_val()}.items():
            known = {name: wnid for name, wnid in wnid_of.items() if wnid in self._all_wnids}
            if not known:
                folder = "train" if split == "train" else "val"
                raise UserError(
                    f"{self.path}: no image in {folder}/ is of a class of wnids.txt; fetch the dataset again"
                )
            keys = {name: name.rpartition("/")[2].rpartition(".")[0] for name in known}
            if len(set(keys.values())) < len(keys):  # files of different classes were given the same names
                keys = {name: f"{known[name]}_{key}" for name, key in keys.items()}
            files[split] = sorted((keys[n], n, label_of[wnid]) for n, wnid in known.items() if wnid in label_of)
        return files

    @cached_property
    def splits(self) -> dict[str, Listing]:
        return {
            split: Listing([key for key, _, _ in files], np.array([label for _, _, label in files], np.int64))
            for split, files in self._files.items()
        }

    def read(self, split: str, index: int) -> bytes:
        return self._bytes(self._files[split][index][1])

    def name(self, split: str, index: int) -> str:
        return self._files[split][index][1]

    def stamp(self) -> str:
        if self._archive is not None:  # checksums of every member
            facts = [f"{m.filename!r} {m.file_size} {m.CRC}" for m in self._archive.infolist()]
            facts.append(str(self.path.stat().st_mtime_ns))
        else:
            stats = ((name, Path(self._root + name).stat()) for name in sorted(self._names))
            facts = [f"{name!r} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _folder(name: str) -> str:
    """Of an image's class, where it lies in one."""
    return name.split("/")[1]


def _refuse_odd(path: Path, member: zipfile.ZipInfo) -> None:
    """Nothing is ever extracted, so such members do no harm; an archive that has them is not what it says it is."""
    parts = member.filename.replace("\\", "/").split("/")
    if ".." in parts or not parts[0]:
        raise UserError(f"{path}: member {member.filename!r} points outside of the archive; fetch the dataset again")
    if member.file_size > MAX_BYTES:
        claimed = f"member {member.filename!r} claims {member.file_size:,} bytes"
        raise UserError(f"{path}: {claimed}, more than {MAX_BYTES:,}: a decompression bomb? Fetch the dataset again")
