"""WebDataset shards that others wrote: indexed where they lie, without a byte of them being changed."""

import codecs
import json
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import BinaryIO

from dlops_dist.data.facts import Facts, refuse_other_size, write_index_and_manifest
from dlops_dist.data.images import decode
from dlops_dist.data.index import UNLABELED
from dlops_dist.data.processes import in_processes
from dlops_dist.data.shards import MANIFEST, PLAN, SHARD_NAME, Manifest, read_manifest
from dlops_dist.data.sources.source import MAX_BYTES, is_litter
from dlops_dist.data.tar import Member, members
from dlops_dist.errors import UserError
from dlops_dist.files import locked, sha256_of

SPLIT_WORDS = {
    "train": "train", "training": "train", "val": "test", "valid": "test", "validation": "test", "test": "test",
    "unlabeled": "unlabeled", "unlabelled": "unlabeled", "unsup": "unlabeled",
}  # fmt: skip
"""Of these words a shard's file name must hold one, which tells its split."""
MAX_CLASSES = 10**6
IMAGES = {"jpg": "jpg", "jpeg": "jpg", "npy": "npy"}
OTHER_IMAGES = ("png", "webp", "bmp", "gif", "ppm", "tif", "tiff", "avif", "heic", "jxl", "jp2")
LABEL_FIELDS = ("label", "class", "cls")
"""Of a json, the first that it has."""
UNPACKERS = {
    ".tar.gz": "gunzip", ".tgz": "gunzip", ".tar.bz2": "bunzip2", ".tbz2": "bunzip2", ".tar.xz": "unxz",
    ".txz": "unxz", ".tar.zst": "unzstd", ".tzst": "unzstd",
}  # fmt: skip
LABELS = ("cls", "json", "txt")
"""Endings of what may hold a label; of several, the first is taken."""
PICKLES = ("pyd", "pkl", "pickle", "pth", "pt")
SHOWN = 6
"""Members of a sample that an error names."""


def adopt(
    folder: Path,
    dataset: str,
    class_names: list[str] | None = None,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write index and manifest beside the shards of a folder.

    A sample is what shares a name up to its first dot, wherever it stands in its shard: an image (jpg, jpeg or npy) and
    a label (cls, or a field of json, or txt). Other members are passed over; pickles are refused.

    Args:
        class_names: in the order of the labels, which may also be names; by default the labels themselves.
        on_progress: called with (shards done, shards in all).
    """
    paths = _shards_in(folder)
    if (folder / PLAN).is_file() or ((folder / MANIFEST).is_file() and read_manifest(folder).packing):
        raise UserError(f"{folder} was packed by dlops_dist.shard, which also writes its index; pack it again")
    _refuse_missing_splits(folder, set(map(_split_of, paths)))
    words = {word for path in paths for word in _split_words(path) if SPLIT_WORDS[word] == "test"}
    if len({"test" if word == "test" else "val" for word in words}) > 1:
        raise UserError(f"{folder} holds shards of val and of test: put those that are not to be tested on elsewhere")
    with locked(folder, "indexed"):
        found: list[Facts] = []
        kinds = set()
        for kind, facts in in_processes(_read, class_names or [], paths, workers or os.cpu_count() or 1):
            found.append(facts)
            refuse_other_size(found, lambda of: f"{folder / of.name}: {of.columns['key'][0]}")
            kinds |= {kind} if kind else set()
            on_progress(len(found), len(paths))
        if len(kinds) != 1:
            raise UserError(f"{folder} holds {' and '.join(sorted(kinds)) or 'no'} images; one kind is needed")
        _refuse_missing_splits(folder, {facts.split for facts in found if facts.shape})
        names = _names(folder, max(label for facts in found for label in facts.columns["label"]), class_names)
        return write_index_and_manifest(folder, dataset, {}, kinds.pop(), names, found)


def _shards_in(folder: Path) -> list[Path]:
    """The .tar files; refuses to leave out what may be meant to be one."""
    files = sorted(path for path in folder.iterdir() if not is_litter(path.name))
    names = {path.name for path in files}
    for path in files:
        ending = next((ending for ending in UNPACKERS if path.name.endswith(ending)), None)
        if ending is not None and path.name.removesuffix(ending) + ".tar" not in names:
            way_out = f"unpack such files first: {UNPACKERS[ending]} {quote(str(folder))}/*{ending}"
            raise UserError(f"{path} is compressed, and images are read where they lie; {way_out}")
    if paths := [path for path in files if path.name.lower().endswith(".tar")]:
        return paths
    below = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.tar"))
    if below := [name for name in below if not is_litter(name)]:
        moved = f"mv {quote(str(folder / below[0]))} {quote(str(folder / below[0].replace('/', '-')))}"
        raise UserError(f"{folder} has no .tar files in it, only in its folders; put all into it: {moved}, and so on")
    raise UserError(f"{folder} has no .tar files in it")


def _refuse_missing_splits(folder: Path, found: set[str]) -> None:
    """What no run could train on, or measure itself on."""
    for split, words in {"train": "'train'", "test": "'val' or 'test'"}.items():
        if split not in found:
            way_out = "rename some of the shards, or add others"
            raise UserError(
                f"{folder}: no file with {words} in its name holds a sample, and training needs one; {way_out}"
            )


def _names(folder: Path, largest: int, class_names: list[str] | None) -> list[str]:
    """Of all classes, where the largest label is so much."""
    if largest >= MAX_CLASSES:
        raise UserError(f"{folder}: there is a label {largest}, which is no class number")
    names = class_names or [str(label) for label in range(largest + 1)]
    if largest >= len(names):
        why = "labels count from 0, so the first name is that of 0"
        raise UserError(f"{folder}: there is a label {largest}, but only {len(names)} class names; {why}")
    return names


def read_class_names(path: Path) -> list[str]:
    """A name in each line, by UTF-8, or by UTF-16 where its mark tells so; blank lines at the end are passed over."""
    try:
        content = path.read_bytes()
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        names = [name.strip() for name in content.decode("utf-16" if is_utf16 else "utf-8-sig").rstrip().splitlines()]
    except OSError as error:
        raise UserError(f"--class-names {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = len(content[: error.start].split(b"\n"))
        raise UserError(f"--class-names {path}: line {line} is not UTF-8 ({error.reason}); save it as UTF-8") from None
    odd = next((number for number, name in enumerate(names or [""], 1) if not name or not name.isprintable()), None)
    if odd is not None:
        raise UserError(f"--class-names {path}: a name is needed in each line, and line {odd} is none")
    return names


def _read(class_names: list[str], path: Path) -> tuple[str, Facts]:
    """The kind of images in a shard, "" where it is empty, and its facts."""
    split = _split_of(path)
    facts, kind = Facts(name=path.name, split=split), ""
    key = ""
    try:
        with path.open("rb") as file:
            for key, image, label in _samples(path):
                own_kind = IMAGES[_extension(image)]
                if kind not in ("", own_kind):
                    raise ValueError(f"a {own_kind} image beside {kind}")
                kind = own_kind
                data = _content(file, image)
                number = _label(file, label, class_names, split)
                facts.add(key, image.offset, data, decode(data, kind), number, folds=0)
    except (ValueError, RecursionError) as error:
        where = f"{path}: {key}" if key else str(path)
        raise UserError(f"{where}: {error}") from None
    facts.num_bytes, facts.sha256 = path.stat().st_size, sha256_of(path)
    return kind, facts


def _split_of(path: Path) -> str:
    """By the words of a shard's name."""
    splits = sorted({SPLIT_WORDS[word] for word in _split_words(path)})
    if len(splits) > 1:
        raise UserError(f"{path}: its name tells several splits, {' and '.join(splits)}; leave one word of these in it")
    if not re.fullmatch(SHARD_NAME, path.name):
        better = path.with_name(re.sub(r"^-|[^A-Za-z0-9._-]", "_", path.stem) + ".tar")
        way_out = f"mv {quote(str(path))} {quote(str(better))}"
        raise UserError(f"{path}: the name may hold only letters, digits and .-_ and end in .tar; rename it: {way_out}")
    if not splits:
        way_out = f"put train, val, test or unlabeled into it: mv {quote(str(path))} "
        raise UserError(f"{path}: its name tells no split; {way_out}{quote(str(path.with_name(f'train-{path.name}')))}")
    return splits[0]


def _split_words(path: Path) -> list[str]:
    return [word for word in re.findall("[a-z]+", path.name.lower()) if word in SPLIT_WORDS]


def _samples(path: Path) -> list[tuple[str, Member, Member | None]]:
    """Key, image and label of each, in the order of their first members.

    Raises:
        ValueError: the archive or a sample is not whole; names it.
    """
    samples: dict[str, dict[str, Member]] = {}
    for member in members(path):
        extension = _extension(member)
        if not extension or is_litter(member.name):
            continue  # a README, or what a Mac adds
        if extension in PICKLES:
            raise ValueError(f"{member.name} is pickled data, which is never read; write the shards without it")
        parts = samples.setdefault(_key(member), {})
        if extension in parts:
            raise ValueError(f"{member.name} occurs twice")
        parts[extension] = member
    return [
        (key, _image(key, parts), next((parts[e] for e in LABELS if e in parts), None))
        for key, parts in samples.items()
        if not re.fullmatch(r"__[^/]*__", key)  # such as __index__, by webdataset's custom
    ]


def _image(key: str, parts: dict[str, Member]) -> Member:
    images = [member for extension, member in parts.items() if extension in IMAGES]
    for extension, member in parts.items():
        more, _, kind = extension.rpartition(".")
        has_label = any(f"{more}.{label}" in parts for label in LABELS)
        if more and kind in (*IMAGES, *OTHER_IMAGES) and (has_label or not images):
            custom = "webdataset ends a sample's name at the first dot"
            raise ValueError(f"{member.name} has a dot in its name, and {custom}; leave only the last dot in all names")
        if kind in OTHER_IMAGES and not images:
            way_out = "put the images into folders by class and run 'python -m dlops_dist.shard folder --source DIR'"
            raise ValueError(f"{member.name} is neither jpg nor npy, which alone are read; {way_out}")
    if len(images) == 1:
        return images[0]
    raise ValueError(f"{key}: {len(images)} images (jpg, jpeg, npy) among its members {', '.join([*parts][:SHOWN])}")


def _key(member: Member) -> str:
    path = PurePosixPath(member.name)
    return str(path.parent / path.name.split(".", 1)[0])


def _extension(member: Member) -> str:
    """All that follows the first dot, as webdataset has it."""
    return PurePosixPath(member.name).name.partition(".")[2].lower()


def _content(file: BinaryIO, member: Member) -> bytes:
    if member.size > MAX_BYTES:
        raise ValueError(f"{member.name} is {member.size:,} bytes long, more than {MAX_BYTES:,}")
    file.seek(member.offset)
    return file.read(member.size)


def _label(file: BinaryIO, member: Member | None, class_names: list[str], split: str) -> int:
    """UNLABELED where there is none, which only the unlabeled split may have."""
    text = None if member is None else _label_text(_content(file, member), _extension(member), split)
    if text is None and split != "unlabeled":
        raise ValueError(f"it has no label: cls, txt, or json with one of the fields {', '.join(LABEL_FIELDS)}")
    if text is None:
        return UNLABELED
    if re.fullmatch(r"\d{1,9}", text):
        return int(text)
    number = class_names.count(text)
    if number == 1:
        return class_names.index(text)
    known = f"and {number} of the class names" if class_names else "pass words by --class-names FILE, one in each line"
    raise ValueError(f"its label {text[:20]!r} is not a number from 0; {known}")


def _label_text(content: bytes, extension: str, split: str) -> str | None:
    """None where a json has none, and for txt without a label to be."""
    if extension == "txt" and split == "unlabeled":
        return None  # a caption
    text = content.decode("utf-8-sig")
    if extension != "json":
        return text.strip()
    values = json.loads(text)
    found = [values[field] for field in LABEL_FIELDS if isinstance(values, dict) and values.get(field) is not None]
    if not found:
        return None
    return str(int(found[0]) if isinstance(found[0], float) and found[0].is_integer() else found[0]).strip()
