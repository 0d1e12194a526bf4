"""One process at a time in a folder. The lock goes with its process, however that ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dlops_dist.errors import UserError


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
