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
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dlops_dist.data.codec import decode
from dlops_dist.data.facts import Facts, FactsOfSamples, replace, write_index_and_manifest
from dlops_dist.data.keys import key
from dlops_dist.data.locks import locked
from dlops_dist.data.order import shuffled
from dlops_dist.data.processes import in_processes
from dlops_dist.data.shards import FORMAT, MANIFEST, UNLABELED, Manifest, Shard, read_manifest, sha256_of
from dlops_dist.data.sources import Source
from dlops_dist.data.tar import BLOCK, END, member_bytes
from dlops_dist.errors import UserError

PLAN = ".packing.json"
OWN_FILE = re.compile(r"(train|test|unlabeled)-\d{6}\.tar|\..*\.(partial|done)")


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
    asked_for: dict[str, int | None] | None = None,
    again: bool = True,
) -> Manifest:
    """Write a source as shards into `out`. Each shard is a pure function of (sorted source, seed, its number).

    Args:
        shard_size: samples in each shard, at most.
        workers: packing processes; by default one for each core.
        on_progress: called with (samples done, samples in all).
        asked_for: whatever else the manifest is to tell of the packing.
        again: pack anew what is complete, perhaps since a moment ago.
    """
    plan = _plan(source, seed, shard_size)
    packing = {"seed": seed, "shard_size": shard_size, **(asked_for or {})}
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, "packed"):
        if not again and (manifest := packed_before(out, packing)) is not None:
            return manifest
        _refuse_strangers(out)
        stamp = source.stamp()
        _begin(out, dataset, packing, source, stamp)
        total, done, facts = sum(len(p.indices) for p in plan), 0, []
        for result in in_processes(_write, (source, out), plan, workers or os.cpu_count() or 1):
            facts.append(result)
            done += result.shard.samples
            on_progress(done, total)
        if source.stamp() != stamp:
            raise UserError(f"the files of {dataset} changed while they were packed; pack them again")
        manifest = write_index_and_manifest(out, dataset, packing, source.extension, source.classes, facts)
        _clear(out, keep={shard.name for shard in manifest.shards})
    return manifest


def packed_before(out: Path, packing: dict[str, int | None]) -> Manifest | None:
    """The manifest of a complete folder, None where there is none. Refuses what was packed otherwise."""
    if not (out / MANIFEST).is_file():
        return None
    manifest = read_manifest(out)
    there = ", ".join(f"--{n.replace('_', '-')} {v}" for n, v in manifest.packing.items() if v != packing.get(n))
    if there or not manifest.packing:
        was = f"with {there}" if there else "by others"
        raise UserError(f"{out} was packed {was}; choose another --out, or pass --again")
    return manifest


def _plan(source: Source, seed: int, shard_size: int) -> list[Planned]:
    plan: list[Planned] = []
    for split, listing in source.splits.items():
        _check_keys(split, listing.keys)
        order = shuffled(key(seed, 0, "packing"), len(listing.keys))
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


def _begin(out: Path, dataset: str, packing: dict[str, int | None], source: Source, stamp: str) -> None:
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
        replace(plan, content)
    (out / MANIFEST).unlink(missing_ok=True)
    if other:
        _clear(out, keep={PLAN})


def _clear(out: Path, keep: set[str]) -> None:
    """Remove what a packing leaves behind: its shards, half-written files, its plan. Never a stranger's file."""
    for path in out.iterdir():
        if path.name not in keep and (OWN_FILE.fullmatch(path.name) or path.name == PLAN):
            path.unlink()


def _write(source_and_out: tuple[Source, Path], planned: Planned) -> Facts:
    """One shard, under a temporary name until it was synced, and read back; one that is whole is kept."""
    source, out = source_and_out
    done = out / f".{planned.name}.done"
    if (facts := _facts_of_whole(out / planned.name, done)) is not None:
        return facts
    tar, collected = _tar_of(source, planned)
    sha256 = hashlib.sha256(tar).hexdigest()
    path = out / planned.name
    replace(path, tar)
    if sha256_of(path) != sha256:
        path.unlink()
        raise UserError(f"{path} reads back otherwise than it was written: is the disk failing?")
    facts = collected.done(planned.name, len(tar), sha256)
    replace(done, json.dumps(facts._replace(shard=facts.shard.model_dump())).encode())  # type: ignore[arg-type]
    return facts


def _facts_of_whole(path: Path, done: Path) -> Facts | None:
    """Those of a shard that an earlier packing of the same finished; None where it did not."""
    if not (path.is_file() and done.is_file()):
        return None
    shard, shape, *rest = json.loads(done.read_bytes())
    facts = Facts(Shard(**shard), tuple(shape), *rest)
    return facts if sha256_of(path) == facts.shard.sha256 else None


def _tar_of(source: Source, planned: Planned) -> tuple[bytearray, FactsOfSamples]:
    listing, extension = source.splits[planned.split], source.extension
    tar, collected = bytearray(), FactsOfSamples(planned.split)
    for index in planned.indices.tolist():
        sample, label = listing.keys[index], int(listing.labels[index])
        folds = 0 if listing.folds is None else int(listing.folds[index])
        data = source.read(planned.split, index)
        try:
            collected.add(sample, len(tar) + BLOCK, data, decode(data, extension), label, folds)
            tar += member_bytes(f"{sample}.{extension}", data)
            if label != UNLABELED:
                tar += member_bytes(f"{sample}.cls", str(label).encode())
        except ValueError as error:
            raise UserError(f"{planned.split} sample {sample} cannot be packed: {error}") from None
    return tar + END, collected
