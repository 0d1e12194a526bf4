"""WebDataset shards that others wrote: indexed where they lie, without a byte of them being changed."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dlops_dist.data.codec import decode
from dlops_dist.data.facts import Facts, FactsOfSamples, write_index_and_manifest
from dlops_dist.data.locks import locked
from dlops_dist.data.pack import PLAN
from dlops_dist.data.processes import in_processes
from dlops_dist.data.shards import MANIFEST, SHARD_NAME, UNLABELED, Manifest, read_manifest, sha256_of
from dlops_dist.data.sources.source import MAX_BYTES
from dlops_dist.data.tar import Member, members
from dlops_dist.errors import UserError

SPLIT_WORDS = {
    "train": "train", "training": "train", "val": "test", "valid": "test", "validation": "test", "test": "test",
    "unlabeled": "unlabeled", "unlabelled": "unlabeled", "unsup": "unlabeled",
}  # fmt: skip
"""Of these words a shard's file name must hold one, which tells its split."""
MAX_CLASSES = 10**6
IMAGES = {"jpg": "jpg", "jpeg": "jpg", "npy": "npy"}
PICKLES = ("pyd", "pkl", "pickle", "pth", "pt")


class Sample(NamedTuple):
    """Members of one key: its image, and the file that holds its label."""

    key: str
    image: Member
    label: Member | None


def adopt(
    folder: Path,
    dataset: str,
    class_names: list[str] | None = None,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write index and manifest beside the shards of a folder.

    A sample is what shares a name up to its first dot, member after member: an image (jpg, jpeg or npy) and a label
    (cls, or the field "label" of json). Other members are passed over; pickles are refused.

    Args:
        class_names: in the order of the labels; by default the labels themselves.
        on_progress: called with (shards done, shards in all).
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder} has no .tar files in it")
    if (folder / PLAN).is_file() or ((folder / MANIFEST).is_file() and read_manifest(folder).packing):
        raise UserError(f"{folder} was packed by launch/shard.py, which also writes its index; pack it again")
    words = {word for path in paths for word in _split_words(path) if SPLIT_WORDS[word] == "test"}
    if len({"test" if word == "test" else "val" for word in words}) > 1:
        raise UserError(f"{folder} holds shards of val and of test: put those that are not to be tested on elsewhere")
    with locked(folder, "indexed"):
        return _adopt(folder, paths, dataset, class_names, workers, on_progress)


def _adopt(
    folder: Path, paths: list[Path], dataset: str, class_names: list[str] | None, workers: int | None,
    on_progress: Callable[[int, int], None],
) -> Manifest:  # fmt: skip
    found: list[Facts] = []
    extensions = set()
    for extension, facts in in_processes(_read, None, paths, workers or os.cpu_count() or 1):
        found.append(facts)
        extensions |= {extension} if extension else set()
        on_progress(len(found), len(paths))
    if len(extensions) != 1:
        raise UserError(f"{folder} holds {' and '.join(sorted(extensions)) or 'no'} images; one kind is needed")
    splits = {facts.shard.split for facts in found if facts.shard.samples}
    if "train" not in splits:
        raise UserError(f"{folder}: no file with 'train' in its name holds a sample")
    labels = [label for facts in found for label in facts.columns["label"]]
    if max(labels) >= MAX_CLASSES:
        raise UserError(f"{folder}: there is a label {max(labels)}, which is no class number")
    names = class_names or [str(label) for label in range(max(labels) + 1)]
    if max(labels) >= len(names):
        raise UserError(f"{folder}: there is a label {max(labels)}, but only {len(names)} class names")
    return write_index_and_manifest(folder, dataset, {}, extensions.pop(), names, found)


def _read(_: None, path: Path) -> tuple[str, Facts]:
    """The kind of images in a shard, "" where it is empty, and its facts."""
    splits = {SPLIT_WORDS[word] for word in _split_words(path)}
    if len(splits) != 1 or not re.fullmatch(SHARD_NAME, path.name):
        words = ", ".join(SPLIT_WORDS)
        raise UserError(
            f"{path}: the name must hold one of {words}, to tell the split, and only letters, digits and .-_"
        )
    (split,) = splits
    facts, kind = FactsOfSamples(split), ""
    key = ""
    try:
        with path.open("rb") as file:
            for key, image, label in _samples(path):
                own_kind = IMAGES[_extension(image)]
                if kind not in ("", own_kind):
                    raise ValueError(f"a {own_kind} image beside {kind}")
                kind = own_kind
                data = _content(file, image)
                number = UNLABELED if label is None else _label(_content(file, label), _extension(label))
                if number == UNLABELED and split != "unlabeled":
                    raise ValueError("it has no label (cls, or json with a field 'label')")
                facts.add(key, image.offset, data, decode(data, kind), number, folds=0)
    except (ValueError, RecursionError) as error:
        where = f"{path}: {key}" if key else str(path)
        raise UserError(f"{where}: {error}") from None
    return kind, facts.done(path.name, path.stat().st_size, sha256_of(path))


def _split_words(path: Path) -> list[str]:
    return [word for word in re.findall("[a-z]+", path.name.lower()) if word in SPLIT_WORDS]


def _samples(path: Path) -> Iterator[Sample]:
    """Raises ValueError where the archive or a sample is not whole; names the sample."""
    seen: set[str] = set()
    key = ""
    parts: dict[str, Member] = {}
    for member in members(path):
        own_key = _key(member)
        if not _extension(member) or PurePosixPath(member.name).name.startswith("._"):
            continue  # a README, or what a Mac adds
        if _extension(member) in PICKLES:
            raise ValueError(f"{member.name} is pickled data, which is never read; write the shards without it")
        if own_key != key:
            yield from _sample(key, parts)
            if own_key in seen:
                raise ValueError(f"{own_key}: its members are not next to each other, or it occurs twice")
            seen.add(own_key)
            key, parts = own_key, {}
        if _extension(member) in parts:
            raise ValueError(f"{member.name} occurs twice")
        parts[_extension(member)] = member
    yield from _sample(key, parts)


def _sample(key: str, parts: dict[str, Member]) -> Iterator[Sample]:
    images = [member for extension, member in parts.items() if extension in IMAGES]
    if not parts or re.fullmatch(r"__[^/]*__", key):  # such as __index__, by webdataset's custom
        return
    if len(images) != 1:
        raise ValueError(f"{key}: {len(images)} images (jpg, jpeg, npy) among its members {', '.join(parts)}")
    yield Sample(key, images[0], parts.get("cls") or parts.get("json"))


def _key(member: Member) -> str:
    path = PurePosixPath(member.name)
    return str(path.parent / path.name.split(".", 1)[0])


def _extension(member: Member) -> str:
    """All that follows the first dot, as webdataset has it."""
    return PurePosixPath(member.name).name.partition(".")[2].lower()


def _content(file: Any, member: Member) -> bytes:
    if member.size > MAX_BYTES:
        raise ValueError(f"{member.name} is {member.size:,} bytes long, more than {MAX_BYTES:,}")
    file.seek(member.offset)
    return file.read(member.size)


def _label(content: bytes, extension: str) -> int:
    """UNLABELED where a json has none."""
    text = content.decode()
    if extension == "json":
        values = json.loads(text)
        if not isinstance(values, dict) or "label" not in values:
            return UNLABELED
        text = str(values["label"])
    if not re.fullmatch(r"\s*\d{1,9}\s*", text):
        raise ValueError(f"its label {text[:20]!r} is not a number from 0")
    return int(text)
