"""Looks into packed shards: is every byte as it was packed, and what do the images look like."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from dlops_dist.data.index import INDEX
from dlops_dist.data.shards import MANIFEST, Manifest, Split
from dlops_dist.files import sha256_of

SHOWN = 5
"""Classes that a sentence names."""


def damages(folder: Path, manifest: Manifest, on_progress: Callable[[int, int], None]) -> list[str]:
    """What differs from the manifest, file by file; empty where every byte is as it was packed.

    Hidden files are passed over: a packing that was killed in its last moment leaves some, and so do file systems.

    Args:
        on_progress: called with (bytes read, bytes in all).
    """
    expected = {INDEX: manifest.index_sha256} | {shard.name: shard.sha256 for shard in manifest.shards}
    sizes = {shard.name: shard.bytes for shard in manifest.shards}
    found, done = [], 0
    for name, sha256 in expected.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != sizes.get(name, path.stat().st_size):
            found.append(f"{name} is {path.stat().st_size} bytes long, not {sizes[name]}")
        elif sha256_of(path) != sha256:
            found.append(f"{name} has changed")
        done += sizes.get(name, 0)
        on_progress(done, sum(sizes.values()))
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    strangers = names - {MANIFEST, *expected} if manifest.packing else set()  # others may keep there what they like
    return found + [f"{name} does not belong there" for name in sorted(strangers)]


def counts_by_class(folder: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """{split: number of samples of each class}; those without a label are left out."""
    labels = {name: Split(folder, manifest, name).labels for name in manifest.splits}
    return {name: np.bincount(of[of >= 0], minlength=len(manifest.classes)) for name, of in labels.items()}


def is_open_set(counts: dict[str, np.ndarray]) -> bool:
    """Whether no class of test has a training sample, by the numbers of `counts_by_class`."""
    return not ((counts["train"] > 0) & (counts["test"] > 0)).any()


def doubts(counts: dict[str, np.ndarray], classes: list[str], global_batch_size: int) -> list[str]:
    """What training would refuse with its usual settings, or would do otherwise than meant; a sentence for each."""
    train, found = counts["train"], []
    if (size := train.sum()) < global_batch_size:
        found.append(
            f"{size} training samples fill no batch of {global_batch_size}; train with --global-batch-size {size}"
        )
    if len(empty := np.flatnonzero(train + is_open_set(counts) * counts["test"] == 0)):
        names = ", ".join(classes[label] for label in empty[:SHOWN]) + ", ..." * (len(empty) > SHOWN)
        hint = "; labels count from 0, do these count from 1?" * (empty.tolist() == [0])
        found.append(f"{len(empty)} of {len(train)} classes have no training sample: {names}{hint}")
    if (train > 0).sum() == 1:
        name = classes[train.argmax()]
        found.append(f"all training samples are of one class, {name}: there is nothing to tell apart")
    return found
