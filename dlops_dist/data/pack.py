"""Sources into shards: parallel, the same bytes whoever packs, never a half-written file that looks whole.

While it goes on, the folder holds besides shards `.packing.json`, what is being packed, and for each whole shard its
facts, `.NAME.done`: a packing that was killed goes on with the shards that are missing.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from pydantic import ValidationError

from dlops_dist.data.facts import Facts, refuse_other_size, write_index_and_manifest
from dlops_dist.data.images import packable
from dlops_dist.data.index import UNLABELED
from dlops_dist.data.keys import key
from dlops_dist.data.order import limited, shuffled
from dlops_dist.data.processes import in_processes
from dlops_dist.data.shards import (
    FORMAT,
    MANIFEST,
    PLAN,
    Manifest,
    Packing,
    read_manifest,
)  # fmt: skip
from dlops_dist.data.sources import Source
from dlops_dist.data.tar import BLOCK, END, member_bytes
from dlops_dist.errors import UserError
from dlops_dist.files import PARTIAL, locked, sha256_of, write_file

OWN_FILE = re.compile(r"(train|test|unlabeled)-\d{6}\.tar|\..*\.(partial|done)")

LISTED = 20
"""So many bad images are named; more are in a file."""


class Planned(NamedTuple):
    """A shard to be written: which samples of its split, in which order."""

    name: str
    split: str
    indices: np.ndarray


def pack(
    source: Source,
    out: Path,
    dataset: str,
    seed: int = 0,
    shard_size: int = 5000,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    asked_for: Packing | None = None,
    again: bool = True,
    size: int | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    on_note: Callable[[str], None] = lambda note: None,
) -> Manifest:
    """Write a source as shards into `out`. Each shard is a pure function of (sorted source, seed, its number).

    Args:
        shard_size: samples in each shard, at most.
        workers: packing processes; by default one for each core.
        on_progress: called with (samples done, samples in all).
        asked_for: whatever else the manifest is to tell of the packing.
        again: pack anew what is complete, perhaps since a moment ago.
        size: of all images, as `packable` takes it.
        limit: of images in each split, evenly over the classes.
        skip_bad: leave out images that cannot be read; the manifest lists them. Without it they are an error.
        on_note: called with what was done to images, and with what was left out.

    Raises:
        UserError: names all images that cannot be read, and why.
    """
    plan = _plan(source, seed, shard_size, limit)
    packing = {"seed": seed, "shard_size": shard_size, **(asked_for or {})}
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, "packed"):
        if not again and (manifest := packed_before(out, packing)) is not None:
            return manifest
        _refuse_strangers(out)
        stamp = source.stamp()
        _begin(out, dataset, packing | {"size": size, "limit": limit}, source, stamp)
        total, done, facts = sum(len(p.indices) for p in plan), 0, []
        for result in in_processes(_write, (source, out, size, skip_bad), plan, workers or os.cpu_count() or 1):
            facts.append(result)
            refuse_other_size(facts, lambda of: f"{source.path}: {_first_image(source, of)}")
            done += len(plan[len(facts) - 1].indices)
            on_progress(done, total)
        if source.stamp() != stamp:
            raise UserError(f"the files of {dataset} changed while they were packed; pack them again")
        bad = {name: why for f in facts for name, why in f.bad.items()}
        if bad and (not skip_bad or not any(f.split == "train" and f.shape for f in facts)):
            ways = "mend or remove them, or leave them out by --skip-bad"
            raise UserError(f"{source.path}: {len(bad):,} images cannot be packed: {_listed(bad, out)}; {ways}")
        for what, number in sum((Counter(f.changed) for f in facts), Counter[str]()).items():
            on_note(f"{source.path}: {number:,} images {what}")
        if bad:
            on_note(f"{source.path}: {len(bad):,} images left out: {_listed(bad, out)}")
        manifest = write_index_and_manifest(out, dataset, packing, source.extension, source.classes, facts, bad)
        _clear(out, keep={shard.name for shard in manifest.shards})
    return manifest


def _first_image(source: Source, of: Facts) -> str:
    return source.name(of.split, source.splits[of.split].keys.index(of.columns["key"][0]))


def _listed(bad: dict[str, str], out: Path) -> str:
    """All of them where they are few, else the first, and a file with all of them."""
    lines = [f"{name} ({why})" for name, why in bad.items()]
    if len(lines) <= LISTED:
        return ", ".join(lines)
    path = out.absolute().parent / f"{out.absolute().name}-bad.txt"
    write_file(path, lambda file: file.write("".join(f"{line}\n" for line in lines).encode()))
    return f"{', '.join(lines[:LISTED])}, and so on; {path} lists them all"


def packed_before(out: Path, packing: Packing) -> Manifest | None:
    """The manifest of a complete folder, None where there is none. Refuses what was packed otherwise."""
    if not (out / MANIFEST).is_file():
        return None
    manifest = read_manifest(out)
    there = ", ".join(_option(name, manifest.packing.get(name)) for name in {**manifest.packing, **packing}
                      if manifest.packing.get(name) != packing.get(name))  # fmt: skip
    if there or not manifest.packing:
        was = f"with {there}" if manifest.packing else "by others"
        raise UserError(f"{out} was packed {was}; choose another --out, or pass --again")
    return manifest


def _option(name: str, value: int | float | None) -> str:
    option = f"--{name.replace('_', '-')}"
    return f"no {option}" if value is None else option if value is True else f"{option} {value}"


def _plan(source: Source, seed: int, shard_size: int, limit: int | None) -> list[Planned]:
    plan: list[Planned] = []
    for split, listing in source.splits.items():
        _check_keys(split, listing.keys)
        kept = limited(listing.labels, limit, seed)
        order = kept[shuffled(key(seed, 0, "packing"), len(kept))]
        for i, start in enumerate(range(0, len(order), shard_size)):
            plan.append(Planned(f"{split}-{i:06d}.tar", split, order[start : start + shard_size]))
    if not any(planned.split == "train" for planned in plan):
        raise UserError("the source has no training images")
    return plan


def _check_keys(split: str, keys: list[str]) -> None:
    """WebDataset cuts a member's name at its first dot, and joins members of one key into one sample."""
    odd = next((k for k in keys if "." in k or not k.isprintable()), None)
    if odd is not None:
        raise UserError(f"{split} sample {odd!r}: a key must be printable and without a dot")
    if len(set(keys)) < len(keys):
        twice = next(k for k, number in Counter(keys).items() if number > 1)
        raise UserError(f"{split} sample {twice!r} occurs twice: keys must differ")


def _refuse_strangers(out: Path) -> None:
    """A folder with shards that no packing of ours has left there."""
    found = sorted(path.name for path in out.glob("*.tar") if OWN_FILE.fullmatch(path.name))
    if found and not (out / PLAN).is_file() and not _has_our_manifest(out):
        raise UserError(f"{out} holds shards that were not packed here, such as {found[0]}; choose another --out")


def _has_our_manifest(out: Path) -> bool:
    """Also one that is damaged, or of another version: its own error says to pack again."""
    try:
        return (out / MANIFEST).is_file() and bool(read_manifest(out).packing)
    except UserError:
        return True


def _begin(out: Path, dataset: str, packing: Packing, source: Source, stamp: str) -> None:
    """Forget what an earlier packing of something else left behind.

    Its facts go first, its manifest after the new plan: whatever kills this, the next call knows whose shards are here.
    """
    listed = hashlib.sha256()
    for split, listing in source.splits.items():
        listed.update(repr((split, listing.keys, listing.labels.tolist())).encode())
    settings = {"dataset": dataset, **packing, "classes": source.classes, "format": FORMAT}
    content = json.dumps([settings, listed.hexdigest(), stamp]).encode()
    plan = out / PLAN
    other = not plan.is_file() or plan.read_bytes() != content
    if other:
        for done in out.glob(".*.done"):
            done.unlink()
        write_file(plan, lambda file: file.write(content))
    (out / MANIFEST).unlink(missing_ok=True)
    if other:
        _clear(out, keep={PLAN})


def clear_complete(out: Path) -> None:
    """Remove what a packing has left that was killed once all was there; not from a folder that may only be read."""
    if (out / PLAN).exists():
        with suppress(OSError, UserError), locked(out, "packed"):
            _clear(out, keep={shard.name for shard in read_manifest(out).shards})


def _clear(out: Path, keep: set[str]) -> None:
    """Remove what a packing leaves behind: its shards, half-written files, last of all its plan. Never a stranger's
    file.
    """
    for path in out.iterdir():
        if path.name not in keep and OWN_FILE.fullmatch(path.name):
            path.unlink()
    if PLAN not in keep:
        (out / PLAN).unlink(missing_ok=True)


def _write(held: tuple[Source, Path, int | None, bool], planned: Planned) -> Facts:
    """One shard, under a temporary name until it was synced, and read back; one that is whole is kept.

    None is written of which images are bad that may not be left out: only its facts come back.
    """
    source, out, size, skip_bad = held
    path, done = out / planned.name, out / f".{planned.name}.done"
    if (facts := _facts_of_whole(path, done)) is not None:
        return facts
    facts = Facts(name=planned.name, split=planned.split)
    of_this_process = f".{path.name}.{os.getpid()}{PARTIAL}"  # a killed packing's may live for a moment yet

    def write_to(file: BinaryIO) -> None:
        _write_tar(source, planned, size, file, facts)
        if facts.bad and not skip_bad:
            raise _NotWrittenError

    try:
        write_file(path, write_to, of_this_process)
    except _NotWrittenError:
        return facts
    if sha256_of(path) != facts.sha256:
        path.unlink()
        raise UserError(f"{path} reads back otherwise than it was written: is the disk failing?")
    write_file(done, lambda file: file.write(facts.model_dump_json().encode()), of_this_process)
    return facts


def _facts_of_whole(path: Path, done: Path) -> Facts | None:
    """Those of a shard that an earlier packing of the same finished; None where it did not."""
    if not (path.is_file() and done.is_file()):
        return None
    try:
        facts = Facts.model_validate_json(done.read_bytes())
    except ValidationError:  # of another version
        return None
    return facts if sha256_of(path) == facts.sha256 else None


class _NotWrittenError(Exception):
    """A shard with bad images, which leaves no file."""


def _write_tar(source: Source, planned: Planned, size: int | None, file: BinaryIO, facts: Facts) -> None:
    """Write a shard as its images come, and collect its facts."""
    listing, extension, sha256 = source.splits[planned.split], source.extension, hashlib.sha256()

    def put(data: bytes) -> None:
        file.write(data)
        sha256.update(data)
        facts.num_bytes += len(data)

    for index in planned.indices.tolist():
        sample, label = listing.keys[index], int(listing.labels[index])
        folds = 0 if listing.folds is None else int(listing.folds[index])
        try:
            image = packable(source.read(planned.split, index), extension, size)
        except (ValueError, OSError) as error:
            facts.bad[source.name(planned.split, index)] = getattr(error, "strerror", None) or str(error)
            continue
        try:
            facts.add(sample, facts.num_bytes + BLOCK, image.data, image.pixels, label, folds)
            put(member_bytes(f"{sample}.{extension}", image.data))
            if label != UNLABELED:
                put(member_bytes(f"{sample}.cls", str(label).encode()))
        except ValueError as error:
            raise UserError(f"{source.path}: {source.name(planned.split, index)}: {error}") from None
        if image.changed:
            facts.changed[image.changed] = facts.changed.get(image.changed, 0) + 1
    put(END)
    facts.sha256 = sha256.hexdigest()
