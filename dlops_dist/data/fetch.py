"""Official archives, fetched where there is a network: whole and checked, or not at all."""

import hashlib
import http.client
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dlops_dist.errors import UserError

BLOCK = 1 << 20


class Archive(NamedTuple):
    """Where a dataset is published, under which file name, with which MD5."""

    url: str
    name: str
    md5: str


OFFICIAL = {
    "tiny-imagenet": Archive(
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"
    ),
    "stl10": Archive(
        "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
        "stl10_binary.tar.gz",
        "91f7769df0f17e558f3565bffb0c7dfb",
    ),
}


def fetch(archive: Archive, folder: Path, on_progress: Callable[[int, int], None]) -> Path:
    """The archive's file in `folder`, downloaded unless it is there. on_progress(bytes so far, bytes in all)."""
    target = folder / archive.name
    if target.is_file():
        with target.open("rb") as file:
            if archive.md5 and hashlib.file_digest(file, _md5).hexdigest() != archive.md5:
                raise UserError(
                    f"{target} is not the official archive (its MD5 differs); use it with --source {target}"
                )
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{archive.name}.partial"
    digest = _md5()
    try:
        with urllib.request.urlopen(archive.url, timeout=30) as response, partial.open("wb") as file:
            total, done = int(response.headers.get("Content-Length", 0)), 0
            while block := response.read(BLOCK):
                file.write(block)
                digest.update(block)
                done += len(block)
                on_progress(done, total)
        if total and done != total:
            raise OSError(f"{done} of {total} bytes came")
    except (OSError, ValueError, http.client.HTTPException) as error:
        partial.unlink(missing_ok=True)
        why = " ".join(str(error).split())
        where = f"fetch it elsewhere and put it at {target}, or name it with --source"
        raise UserError(f"cannot fetch {archive.url} ({why}); {where}") from None
    if archive.md5 and digest.hexdigest() != archive.md5:
        partial.unlink()
        raise UserError(f"{archive.url}: MD5 is {digest.hexdigest()}, not {archive.md5}; try again")
    partial.rename(target)
    return target


def _md5() -> "hashlib._Hash":
    return hashlib.md5(usedforsecurity=False)
