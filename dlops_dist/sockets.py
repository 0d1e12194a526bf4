"""Room for the paths of sockets, which lie below the folder for temporary files."""

import os
import shutil
import sys
import tempfile
from contextlib import suppress
from multiprocessing.util import Finalize
from pathlib import Path

from dlops_dist.errors import UserError
from dlops_dist.files import make_writable

SOCKET_PATH = 103 if sys.platform == "darwin" else 107
LONGEST_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""Below the folder for temporary files."""
SHORT_FOLDERS = "/tmp", "/var/tmp", "/dev/shm"
REMOVED_LAST = -200
"""The standard library removes its sockets' folder at -100."""


def leave_room_for_sockets(variable: str = "TMPDIR") -> None:
    """Make the folder that an environment variable names short enough for the paths of sockets below it.

    The system cuts those at 107 bytes, and a job's own folder alone may have 80. Then a short link leads there, and the
    variable names the link, for this process and those that it starts: what they write lies where it was to lie.

    Raises:
        UserError: nothing can be written there, or the link has no place.
    """
    place = os.environ.get(variable)
    if not place:
        return
    make_writable(Path(place), variable, "set it to a folder of yours")
    if len(os.fsencode(Path(place).absolute())) <= SOCKET_PATH - len(LONGEST_SOCKET):
        return
    for short in SHORT_FOLDERS:
        with suppress(OSError):
            folder = tempfile.mkdtemp(prefix="dlops_dist-", dir=short)
            Finalize(None, shutil.rmtree, (folder, True), exitpriority=REMOVED_LAST)
            link = Path(folder) / "t"
            link.symlink_to(Path(place).absolute())
            os.environ[variable] = str(link)
            tempfile.tempdir = None  # Python looks again
            return
    raise UserError(
        f"{variable}: {place} is too long for the paths of sockets below it; set it to a folder of at most "
        f"{SOCKET_PATH - len(LONGEST_SOCKET)} bytes"
    )
