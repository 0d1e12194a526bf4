"""Official archives, fetched where there is a network: whole and checked, or not at all."""

import hashlib
import http.client
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError

from dlops_dist.errors import UserError
from dlops_dist.files import PARTIAL, locked

BLOCK = 1 << 20
MOST_POOR_ANSWERS = 10
"""In a row, each of less than a block."""
RANGE_NOT_SATISFIABLE = 416


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
    """The archive's file in `folder`, downloaded unless it is there. on_progress(bytes so far, bytes in all).

    A download that was cut goes on where it stopped, at once and in a later call; the file gets its name only when it
    is whole and its checksum is right.
    """
    target = folder / archive.name
    if target.is_file():
        if archive.md5 and _md5_of(target) != archive.md5:
            raise UserError(f"{target} is not the official archive (its MD5 differs); use it with --source {target}")
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{archive.name}{PARTIAL}"
    with locked(folder, "fetched into"):
        _download_all(archive, partial, target, on_progress)
        _version_file(partial).unlink(missing_ok=True)
        if archive.md5 and (md5 := _md5_of(partial)) != archive.md5:
            partial.unlink()
            raise UserError(f"{archive.url}: MD5 is {md5}, not {archive.md5}; try again")
        partial.rename(target)
    return target


def _download_all(archive: Archive, partial: Path, target: Path, on_progress: Callable[[int, int], None]) -> None:
    """Again and again, as long as each answer brings something, and not too many of them little."""
    poor_answers = 0
    while True:
        before = _size(partial)
        try:
            return _download(archive, partial, on_progress)
        except (OSError, ValueError, http.client.HTTPException) as error:
            gained = _size(partial) - before
            poor_answers = 0 if gained >= BLOCK else poor_answers + 1
            status = error.code if isinstance(error, HTTPError) else None
            if status is None and gained > 0 and poor_answers < MOST_POOR_ANSWERS:
                continue
            if status == RANGE_NOT_SATISFIABLE and before:
                partial.unlink(missing_ok=True)  # it is whole, or the file has shrunk: from the start
                continue
            if not _known_version(partial):  # it could not be gone on with
                partial.unlink(missing_ok=True)
                _version_file(partial).unlink(missing_ok=True)
            why = " ".join(str(error).split())
            where = f"fetch it elsewhere and put it at {target}, or name it with --source"
            raise UserError(f"cannot fetch {archive.url} ({why}); {where}") from None


def _download(archive: Archive, partial: Path, on_progress: Callable[[int, int], None]) -> None:
    """The rest of the file, or all of it where the server cannot go on with the same version."""
    done, known = _size(partial), _known_version(partial)
    headers = {"Range": f"bytes={done}-", "If-Range": known} if done and known else {}
    with urllib.request.urlopen(urllib.request.Request(archive.url, headers=headers), timeout=30) as response:
        if response.headers.get("Content-Range", "").startswith(f"bytes {done}-") and headers:
            mode = "ab"
        else:
            mode, done = "wb", 0
        _version_file(partial).write_text(_version(response.headers))
        total = done + int(response.headers.get("Content-Length", 0))
        if mode == "ab":
            total = int(response.headers["Content-Range"].rpartition("/")[2])
        with partial.open(mode) as file:
            while block := response.read(BLOCK):
                file.write(block)
                done += len(block)
                on_progress(done, total)
    if total and response.headers.get("Content-Length") and done != total:
        raise OSError(f"{done} of {total} bytes came")


def _version(headers: Mapping[str, str]) -> str:
    """What names this version of the file to the server: a strong ETag, or the time it was changed; else nothing."""
    tag = headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")


def _known_version(partial: Path) -> str:
    file = _version_file(partial)
    return file.read_text() if file.is_file() else ""


def _version_file(partial: Path) -> Path:
    return partial.with_suffix(".version")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
