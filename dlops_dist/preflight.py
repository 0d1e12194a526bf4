"""What must be alike on all nodes of a cluster before a run begins: seen on each, then compared."""

import hashlib
import os
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from dlops_dist.data.shards import read_manifest
from dlops_dist.errors import UserError
from dlops_dist.files import Folder

PACKAGES = ("torch", "numpy", "ray", "simplejpeg")
"""Of which another version may compute other bits, or nothing."""


class Seen(NamedTuple):
    """What a node sees of a run that is about to begin."""

    host: str
    dataset_id: str | None
    """None where there are no shards at the path."""
    run: str
    """"" where the run can be written to, else why not."""
    versions: dict[str, str]


def look(shards: str, run: str, config: str) -> Seen:
    """From the node that this is called on.

    Args:
        config: a file that is in the folder of the run.
    """
    try:
        dataset_id = read_manifest(Path(shards)).id
    except UserError:
        dataset_id = None
    folder = Folder(run)
    missing = "" if config in folder.names() else "is not there"
    if folder.local and not missing and not os.access(folder.local, os.W_OK):
        missing = "cannot be written to"
    versions = {"Python": platform.python_version(), "dlops_dist": _source_hash()}
    return Seen(platform.node(), dataset_id, missing, versions | {name: version(name) for name in PACKAGES})


def complaints(here: Seen, there: Seen, shards: str, run: str) -> list[str]:
    """A line for whatever is not on another node as it is here: what, where, what to do."""
    on, lines = f"node {there.host}", []
    if there.dataset_id != here.dataset_id:
        what = "are not there" if there.dataset_id is None else "are of another dataset"
        lines.append(f"data.shards: {shards} {what} on {on}; put them where every node sees them")
    if there.run:
        lines.append(f"runs_dir: {run} {there.run} on {on}; choose a --runs-dir that every node sees")
    for name, ours in here.versions.items():
        if there.versions[name] != ours:
            lines.append(f"{name} is {ours} here and {there.versions[name]} on {on}; install the same everywhere")
    return lines


@cache
def _source_hash() -> str:
    """Of this package's own code: its version number says little of a working copy."""
    package = Path(__file__).parent
    content = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return content.hexdigest()[:8]
