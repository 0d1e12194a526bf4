"""A folder of files, here or at a URL, in which a file is whole or not there."""

import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dlops_dist.errors import UserError

PARTIAL = ".partial"
"""What is being written, or was when its process died: one at a time in each folder."""


class Folder:
    """A folder of this machine's, or one at a URL that fsspec knows (s3://, gs://, memory:// ...).

    Args:
        place: path or URL.

    Raises:
        UserError: fsspec does not know the URL, or a package that it needs is missing.
    """

    def __init__(self, place: str | Path) -> None:
        self._place = str(place)
        self._files: Any = None
        if is_url(self._place):
            import fsspec

            try:
                self._files, self._root = fsspec.core.url_to_fs(self._place)
            except (ImportError, ValueError) as error:
                raise UserError(f"{self._place}: {error}") from None

    def __str__(self) -> str:
        return self._place

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self._place.rstrip('/')}/{name}" if self._files else Path(self._place) / name)

    @property
    def local(self) -> Path | None:
        """Where it lies on this machine; None at a URL."""
        return None if self._files else Path(self._place)

    def names(self) -> list[str]:
        """Of the whole files in it, sorted; none where there is no such folder.

        Raises:
            UserError: a URL cannot be reached.
        """
        if self._files is None:
            folder = Path(self._place)
            found = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
        else:
            try:
                self._files.invalidate_cache()
                there = self._files.exists(self._root)
                listed = self._files.ls(self._root, detail=True) if there else []
            except Exception as error:  # each kind of storage has its own
                raise UserError(f"{self}: {type(error).__name__}: {error}") from None
            found = [entry["name"].rsplit("/", 1)[-1] for entry in listed if entry["type"] == "file"]
        return sorted(name for name in found if not name.startswith("."))

    def open(self, name: str) -> BinaryIO:
        """A file that can be read from any place on."""
        if self._files is None:
            return (Path(self._place) / name).open("rb")
        return io.BytesIO(self._files.cat_file(f"{self._root}/{name}"))

    def write(self, name: str, write_to: Callable[[BinaryIO], object]) -> None:
        """Make or replace a file by what `write_to(file)` writes. It has its name once all of it is safe."""
        if self._files is None:
            folder = Path(self._place)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with (folder / PARTIAL).open("wb") as file:
                    write_to(file)
                    file.flush()
                    os.fsync(file.fileno())
            except BaseException as error:
                (folder / PARTIAL).unlink(missing_ok=True)
                if isinstance(error, OSError) and error.errno is not None and error.filename is None:
                    error.filename = str(folder / name)  # a full disk does not say of which file it was
                raise
            (folder / PARTIAL).rename(folder / name)
            return
        content = io.BytesIO()
        write_to(content)
        self._files.makedirs(self._root, exist_ok=True)
        self._files.pipe_file(f"{self._root}/{PARTIAL}", content.getvalue())
        self._files.mv(f"{self._root}/{PARTIAL}", f"{self._root}/{name}")

    def write_text(self, name: str, text: str) -> None:
        self.write(name, lambda file: file.write(text.encode()))

    def delete(self, name: str) -> None:
        if self._files is None:
            (Path(self._place) / name).unlink()
        else:
            self._files.rm_file(f"{self._root}/{name}")

    @contextmanager
    def as_path(self) -> Iterator[Path]:
        """A folder of this machine's to write files into by path; from there they go to the URL at the end."""
        if self.local is not None:
            self.local.mkdir(parents=True, exist_ok=True)
            yield self.local
            return
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
            for path in Path(scratch).iterdir():
                with path.open("rb") as file:
                    self.write(path.name, lambda there, here=file: shutil.copyfileobj(here, there))  # type: ignore[misc]


def is_url(place: str) -> bool:
    return "://" in place
