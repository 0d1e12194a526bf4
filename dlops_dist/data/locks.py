"""One process at a time in a folder. The lock goes with its process, however that ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dlops_dist.errors import UserError
from dlops_dist.files import Folder, make_writable


@contextmanager
def locked(folder: Path, use: str) -> Iterator[None]:
    """Raises UserError where another process of this node holds the folder; `use` says what for, such as "packed"."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder} is being {use} by another process; wait for it, or choose another folder") from None
    else:
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
