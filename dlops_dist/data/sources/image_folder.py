"""Any tree with a folder for each class, or with folders of splits and those of the classes in them."""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePath
from unicodedata import normalize

import numpy as np

from dlops_dist.data.order import hold_out
from dlops_dist.data.sources.source import MAX_BYTES, Listing, is_litter
from dlops_dist.errors import UserError

JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
OTHERS = (".png", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff")
LONGEST_KEY = 80
"""Bytes: with a number and its ending it must fit the 100 of a tar header."""
SPLITS = {"train": ("train", "training"), "test": ("test", "val", "valid", "validation")}
"""Folders that a split may lie in, in any case; of several, the first is taken."""
SPLIT_WORDS = tuple(word for words in SPLITS.values() for word in words)
TEST_FRACTION = 0.1
NAMED = 3
"""Of what is passed over for one reason, and of the classes, so many are named."""


class ImageFolder:
    """Classes are the names of folders, sorted; their images lie anywhere below them.

    ROOT/CLASS/..., or ROOT/train/CLASS/... and perhaps ROOT/test/CLASS/...; whatever else lies there is passed over and
    told by `described`. A tree that may be meant otherwise is refused. Where no class of test is in train the classes
    are those of both: an open set.

    Args:
        path: the root.
        num_classes: only the first so many classes; of an open set, of each split.
        test_fraction: part of each class that becomes the test split of a tree that has none; by default a tenth.
    """

    def __init__(self, path: Path, num_classes: int | None = None, test_fraction: float | None = None) -> None:
        self.path, self.num_classes, self._asked_for = path, num_classes, test_fraction
        self.test_fraction = TEST_FRACTION if test_fraction is None else test_fraction
        if not path.is_dir():
            raise UserError(f"{path} is not a folder; unpack an archive first")

    @cached_property
    def _tree(self) -> dict[str, list[PurePath]]:
        """{why they are no images to pack, or "": paths of files} below the root, also behind links."""
        found: dict[str, list[PurePath]] = {"": []}
        for path, why in _walk(self.path, PurePath(), (os.path.realpath(self.path),)):
            found.setdefault(why, []).append(path)
        return found | {"": sorted(found[""])}

    @property
    def _images(self) -> list[PurePath]:
        return self._tree[""]

    def _folders_in(self, place: PurePath) -> list[str]:
        """Names of the folders in it that have images in them."""
        depth = len(place.parts)
        inside = (path.parts for path in self._images if path.parts[:depth] == place.parts)
        return sorted({parts[depth] for parts in inside if len(parts) > depth + 1})

    @cached_property
    def _roots(self) -> dict[str, PurePath]:
        """The folder of each split, from the root; train alone, '.', where the classes lie at the root."""
        names = {name.lower(): PurePath(name) for name in self._folders_in(PurePath())}
        trains, tests = ([names[word] for word in words if word in names] for words in SPLITS.values())
        others = sorted(str(name) for word, name in names.items() if word not in SPLIT_WORDS)
        if tests and not trains:
            beside = _first(sorted(map(str, names.values())))
            raise UserError(f"{self.path} has no folder 'train' beside {beside}; put the training images into one")
        if not trains or (others and not tests and len(self._folders_in(trains[0])) < 2):
            return {"train": PurePath()}
        if others and not tests:
            raise UserError(
                f"{self.path}: is '{trains[0]}' a split, or a class as '{others[0]}' is? Move the others away, or name "
                f"--source {self.path / trains[0]}"
            )
        test = next((root for root in tests if self._folders_in(root)), None)
        return {"train": trains[0]} | ({} if test is None else {"test": test})

    @cached_property
    def classes(self) -> list[str]:
        train = self._roots["train"]
        folders = self._class_folders(train)
        names = sorted(folders)
        if not names:
            endings = ", ".join((*JPEG, *OTHERS))
            raise UserError(f"{self.path / train} has no folders of classes in it, with images ({endings})")
        if len(names) == 1 and len(self._folders_in(only := train / folders[names[0]])) > 1:
            raise UserError(
                f"{self.path / train} has one class only, {names[0]!r}, with folders in it; if these are the classes, "
                f"name --source {self.path / only}" + (", or move them up" if train.parts else "")
            )
        if self.num_classes is not None and self.num_classes > len(names):
            raise UserError(f"--classes {self.num_classes}: {self.path} has {len(names)} classes")
        return sorted(names[: self.num_classes] + self._unseen[: self.num_classes])

    @cached_property
    def _unseen(self) -> list[str]:
        """The classes of test where none of them is in train, as in an open set; a mistake where some are."""
        roots = self._roots["train"], self._roots.get("test", self._roots["train"])
        trained, tested = (set(self._class_folders(root)) for root in roots)
        unseen = sorted(tested - trained)
        if unseen and (len(unseen) < len(tested) or len(tested) == 1):  # one class alone leaves nothing to tell apart
            names = _first(sorted(trained))
            raise UserError(
                f"{self.path}: classes to test on that are not in train: {_first(unseen)}; train has {names}"
            )
        return unseen

    def _class_folders(self, root: PurePath) -> dict[str, str]:
        """{class: folder in the root}, where a class's name has one Unicode form however a system has written it."""
        folders: dict[str, str] = {}
        for folder in self._folders_in(root):
            if not folder.isprintable():
                raise UserError(f"{self.path / root}: the folder {folder!r} has a name that is not text; rename it")
            if folders.setdefault(normalize("NFC", folder), folder) != folder:
                raise UserError(
                    f"{self.path / root}: two folders are both called {folder!r}, in different Unicode forms; put "
                    f"their images into one"
                )
        return folders

    @cached_property
    def _files(self) -> dict[str, tuple[list[Path], np.ndarray]]:
        """Images and labels of each split, sorted by class and path."""
        labels_of = {name: label for label, name in enumerate(self.classes)}
        files: dict[str, tuple[list[Path], np.ndarray]] = {}
        for split, root in self._roots.items():
            depth, found = len(root.parts), []
            for path in self._images:
                if path.parts[:depth] == root.parts and len(path.parts) > depth + 1:
                    label = labels_of.get(normalize("NFC", path.parts[depth]))
                    found += [] if label is None else [(label, path)]
            found.sort()
            files[split] = [self.path / path for _, path in found], np.array([label for label, _ in found], np.int64)
        if "test" not in files:
            paths, labels = files["train"]
            for split, ids in zip(("train", "test"), hold_out(labels, self.test_fraction), strict=True):
                files[split] = [paths[i] for i in ids], labels[ids]
        elif self._asked_for is not None:
            raise UserError(f"--test-fraction {self._asked_for}: {self.path} has a test split, {self._roots['test']}/")
        if self.test_fraction and not files["test"][0]:
            raise UserError(f"{self.path} has too few images to hold {self.test_fraction:.0%} of each class out for a "
                            f"test; add a folder 'test' to it, or raise --test-fraction")  # fmt: skip
        return files

    @cached_property
    def extension(self) -> str:
        """jpg where every image is called one; else raw pixels, which lose nothing."""
        lossy = all(path.suffix.lower() in JPEG for paths, _ in self._files.values() for path in paths)
        return "jpg" if lossy else "npy"

    @cached_property
    def splits(self) -> dict[str, Listing]:
        return {split: Listing(self._keys(split, paths), labels) for split, (paths, labels) in self._files.items()}

    def _keys(self, split: str, paths: list[Path]) -> list[str]:
        """CLASS_NAME of each image, with a number where that occurs twice; a long one is cut and hashed."""
        root = self.path / self._roots.get(split, self._roots["train"])
        keys, seen = [_key(path.relative_to(root)) for path in paths], set()
        for place, key in enumerate(keys):
            number = place
            while keys[place] in seen:
                keys[place], number = f"{key}-{number}", number + 1
            seen.add(keys[place])
        return keys

    def read(self, split: str, index: int) -> bytes:
        path = self._files[split][0][index]
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is {path.stat().st_size:,} bytes long, more than {MAX_BYTES:,}")
        return path.read_bytes()

    def name(self, split: str, index: int) -> str:
        return str(self._files[split][0][index].relative_to(self.path))

    def stamp(self) -> str:
        stats = ((path, path.stat()) for paths, _ in self._files.values() for path in paths)
        facts = (f"{path.relative_to(self.path)!r} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    @cached_property
    def described(self) -> str:
        """How the tree was understood, and what of it is passed over."""
        (train, labels), (test, _) = self._files["train"], self._files["test"]
        counts = Counter(labels.tolist())
        numbers = [f"{name} {counts[n]:,}" for n, name in enumerate(self.classes) if name not in self._unseen]
        unseen = [name for name in self.classes if name in self._unseen]
        places = {split: f" in {root}/" for split, root in self._roots.items() if root.parts}
        held_out = "" if "test" in self._roots else f" ({self.test_fraction:.0%} of each class)"
        line = (
            f"{self.path}: {len(train):,} images to train{places.get('train', '')}, {len(test):,} to test"
            f"{places.get('test', held_out)}, {len(numbers)} classes: {_first(numbers)}"
        )
        if unseen:
            line += f"; an open set: {len(unseen)} other classes to test on: {_first(unseen)}"
        return "\n".join([line, *(f"  passed over: {text}" for text in self._passed_over())])

    def _passed_over(self) -> Iterator[str]:
        used = {path.relative_to(self.path) for paths, _ in self._files.values() for path in paths}
        images: dict[str, Counter[str]] = defaultdict(Counter)
        for path in self._images:
            if path not in used:
                root = next((r for r in self._roots.values() if path.parts[: len(r.parts)] == r.parts), None)
                if root is None:
                    images["beside the splits"][_shown(PurePath(path.parts[0]))] += 1
                elif len(path.parts) <= len(root.parts) + 1:
                    images["outside of the folders of classes"][_shown(path.parent)] += 1
                else:
                    images["of further classes"][_shown(path.parent)] += 1
        for why, places in images.items():
            yield f"{places.total():,} images {why}: {_first([f'{place}/ {n:,}' for place, n in places.items()])}"
        for why, paths in self._tree.items():
            if why:
                yield f"{len(paths):,} {why}: {_first(list(map(_shown, paths)))}"


def _walk(root: Path, inside: PurePath, above: tuple[str, ...]) -> Iterator[tuple[PurePath, str]]:
    """(path, why it is no image to pack, or '') of all files; `above` are the real folders that this one lies in."""
    for entry in sorted(os.scandir(root / inside), key=lambda entry: entry.name):
        path = inside / entry.name
        if is_litter(entry.name):
            yield path, "that systems leave behind"
        elif entry.is_dir() and (real := os.path.realpath(entry.path)) in above:
            yield path, "links to a folder that they lie in"
        elif entry.is_dir():
            some = False
            for below, why in _walk(root, path, (*above, real)):
                some = some or not why
                yield below, why
            if not some:
                yield path, "folders without an image"
        elif not entry.is_file():
            yield path, "links to nothing, or no plain files"
        else:
            yield path, "" if path.suffix.lower() in (*JPEG, *OTHERS) else "no images by their endings"


def _key(path: PurePath) -> str:
    key = re.sub(r"[^\w-]", "_", normalize("NFC", str(path.with_suffix("")))).lstrip("_") or "image"
    if len(key.encode()) > LONGEST_KEY:
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        key = key.encode()[: LONGEST_KEY - 20].decode(errors="ignore") + digest
    return key


def _shown(path: PurePath) -> str:
    return str(path) if str(path).isprintable() else repr(str(path))


def _first(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED:,} more" if len(names) > NAMED else "")
