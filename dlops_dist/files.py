"""Files that are whole or not there, in folders here or at a URL, and locks on them."""

import fcntl
import hashlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dlops_dist.errors import UserError, first_line

PARTIAL = ".partial"
"""What is being written, or was when its process died."""
OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss"})
"""Where a name needs no folder; who asked for one would be given a new bucket in place of a mistyped one."""
TELL_EVERY_S = 5.0


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
                raise UserError(f"{self}: {type(error).__name__}: {first_line(error)}") from None
            found = [entry["name"].rsplit("/", 1)[-1] for entry in listed if entry["type"] == "file"]
        return sorted(name for name in found if not name.startswith("."))

    def open(self, name: str) -> BinaryIO:
        """A file that can be read from any place on."""
        if self._files is None:
            return (Path(self._place) / name).open("rb")
        return io.BytesIO(self._files.cat_file(f"{self._root}/{name}"))

    def write(self, name: str, write_to: Callable[[BinaryIO], object], partial: str | None = None) -> None:
        """Make or replace a file by what `write_to(file)` writes. It has its name once all of it is safe.

        Args:
            partial: as of `write_file`.
        """
        if self._files is None:
            Path(self._place).mkdir(parents=True, exist_ok=True)
            write_file(Path(self._place) / name, write_to, partial)
            return
        content, path = io.BytesIO(), f"{self._root}/{name}"
        write_to(content)
        if self._stores_objects:  # each is there as a whole, or not
            self._files.pipe_file(path, content.getvalue())
            return
        self._files.makedirs(self._root, exist_ok=True)
        until_whole = f"{self._root}/{partial or _partial(name)}"
        self._files.pipe_file(until_whole, content.getvalue())
        self._files.mv(until_whole, path)

    def write_text(self, name: str, text: str) -> None:
        self.write(name, lambda file: file.write(text.encode()))

    def create(self, name: str, text: str) -> bool:
        """Make a file, where there is none of the name yet; else False."""
        try:
            if self._files is None:
                with (Path(self._place) / name).open("x") as file:
                    file.write(text)
            else:
                if not self._stores_objects:
                    self._files.makedirs(self._root, exist_ok=True)
                self._files.pipe_file(f"{self._root}/{name}", text.encode(), mode="create")
        except FileExistsError:
            return False
        return True

    @property
    def _stores_objects(self) -> bool:
        return self._place.partition("://")[0] in OBJECT_STORES

    def append(self, name: str, text: str) -> None:
        """Add to the end of a file; a process that is killed meanwhile may leave a part of the text."""
        if self._files is None:
            path = Path(self._place) / name
            try:
                with path.open("ab") as file:
                    file.write(text.encode())
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from None  # a full disk names no file
            return
        before = self._files.cat_file(f"{self._root}/{name}") if name in self.names() else b""
        self.write(name, lambda file: file.write(before + text.encode()))

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
        with tempfile.TemporaryDirectory(dir=temporary_folder()) as scratch:
            yield Path(scratch)
            for path in Path(scratch).iterdir():
                with path.open("rb") as file:
                    self.write(path.name, lambda there, here=file: shutil.copyfileobj(here, there))  # type: ignore[misc]


def write_file(path: Path, write_to: Callable[[BinaryIO], object], partial: str | None = None) -> None:
    """Make or replace a file by what `write_to(file)` writes. It has its name once all of it is safe.

    Args:
        partial: its name until then, which a killed process leaves behind; by default one that goes with its own, so
            that other files may be written meanwhile.

    Raises:
        OSError: names the file, also where the system does not, as of a full disk. Nothing is left of it.
    """
    until_whole = path.with_name(partial or _partial(path.name))
    try:
        with until_whole.open("w+b") as file:
            write_to(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        until_whole.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(until_whole)):
            error.filename = str(path)
        raise
    until_whole.rename(path)


def _partial(name: str) -> str:
    return f".{name}{PARTIAL}"


@contextmanager
def locked(path: Path, use: str, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Keep other processes of this node from a folder, or from what a file that is made for it stands for.

    The lock goes with its process, however that ends.

    Args:
        use: what the folder is held for, such as "packed".
        on_wait: called every few seconds while another process holds it; without it that is an error.

    Raises:
        UserError: another process holds it, and is not to be waited for.
    """
    mode = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT  # NFS locks no file that is not writable
    descriptor, told = os.open(path, mode | os.O_CLOEXEC, 0o666), time.monotonic()
    try:
        while not _is_ours(descriptor):
            if on_wait is None:
                way_out = "wait for it, or choose another folder"
                raise UserError(f"{path} is being {use} by another process; {way_out}")
            if time.monotonic() - told > TELL_EVERY_S:
                told = time.monotonic()
                on_wait()
            time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def file_to_write(place: str, option: str) -> Iterator[tuple[Folder, str]]:
    """The folder, which no other process writes to meanwhile, and the name of a file that is to be written.

    Raises:
        UserError: it cannot be, said before there is anything to lose; names the option.
    """
    parent, name = os.path.split(place)
    folder = Folder(parent)
    if folder.local is None:
        yield folder, name
        return
    if not name or Path(place).is_dir():
        raise UserError(f"{option}: {place} is a folder; name a file in it")
    make_writable(folder.local, option, "name a file elsewhere")
    with locked(folder.local, "written to"):
        yield folder, name


def _is_ours(descriptor: int) -> bool:
    """Whether its lock could be taken."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_url(place: str) -> bool:
    return "://" in place


def path_here(place: str) -> Path:
    """A path as it was given, where it is none of a URL, which a path would change."""
    if is_url(place):
        raise UserError(f"{place} must be a path on this machine; nothing is fetched")
    return Path(place)


def make_writable(folder: Path, setting: str, advice: str) -> None:
    """Make a folder, and refuse one that nothing can be written to, before there is anything to lose.

    Args:
        setting: that named the folder.
        advice: what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{setting}: {folder} cannot be written to ({error.strerror}); {advice}") from None


def temporary_folder() -> Path:
    """The folder for temporary files: the first of TMPDIR, /tmp and others that can be written to."""
    try:
        return Path(tempfile.gettempdir()).resolve()
    except FileNotFoundError:
        raise UserError("TMPDIR: there is no folder for temporary files; set it to one that you can write to") from None


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
