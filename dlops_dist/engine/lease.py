"""Which process a run belongs to, for all machines that see its folder: a file there, renewed while that process lives.

A lock is one machine's alone, and a URL has none.
"""

import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from dlops_dist.errors import RunError, UserError, first_line
from dlops_dist.files import Folder

LEASE = "lease.json"
RENEW_S, LOST_S = 10.0, 30.0
"""How often a lease is renewed; how long it is watched before it is taken over."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@contextmanager
def lease(folder: Folder, tell: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Own a run. A process that died on this machine is succeeded at once, one elsewhere after it was watched.

    Raises:
        UserError: the run belongs to another process, which lives.
        RunError: another has taken over, as this one did not renew the lease in time.
    """
    host = {"host": platform.node(), "boot": BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""}
    mine: dict[str, Any] = {"owner": uuid4().hex, **host, "process": os.getpid(), "renewed": 0}
    _acquire(folder, mine, tell)
    ended, lost = threading.Event(), threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_S):
            with suppress(Exception):  # whoever cannot reach the folder now may later
                if owner(folder) != mine["owner"]:
                    lost.set()
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # wakes it, too
                    return
                mine["renewed"] += 1
                folder.write_text(LEASE, json.dumps(mine))

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if lost.is_set():
            raise RunError(taken_over(folder)) from None
        raise
    finally:
        ended.set()
        thread.join()
        with suppress(Exception):  # a URL that cannot be reached now: who comes next watches the lease
            if owner(folder) == mine["owner"]:
                folder.delete(LEASE)


def owner(folder: Folder) -> str | None:
    """Whom a run belongs to; None where it is nobody's."""
    return _read(folder).get("owner")


def taken_over(folder: Folder) -> str:
    return f"{folder} is now trained by {_place(_read(folder))}; this process has left it"


def _acquire(folder: Folder, mine: dict[str, Any], tell: Callable[[str], None]) -> None:
    seen: dict[str, Any] | None = None
    until = 0.0
    while not _create(folder, mine):
        there = _read(folder)
        is_here = (there.get("host"), there.get("boot")) == (mine["host"], mine["boot"])
        if (seen is not None and there != seen) or (is_here and _lives(there["process"])):
            raise UserError(f"{folder} is being trained by {_place(there)}; wait for it, or choose another --name")
        if is_here or (seen is not None and time.monotonic() > until):
            folder.write_text(LEASE, json.dumps(mine))
            return
        if seen is None:
            seen, until = there, time.monotonic() + LOST_S
            tell(f"{folder} belonged to {_place(there)}; watching for {LOST_S:.0f} s whether that still lives")
        time.sleep(1)


def _create(folder: Folder, mine: dict[str, Any]) -> bool:
    try:
        return folder.create(LEASE, json.dumps(mine))
    except Exception as error:
        raise unwritable(folder, error) from None


def unwritable(folder: Folder, error: Exception) -> UserError:
    """What is said of a run's folder; each kind of storage has errors of its own."""
    why = getattr(error, "strerror", None) or first_line(error)
    return UserError(f"runs_dir: {folder} cannot be written to ({why}); choose another --runs-dir")


def _read(folder: Folder) -> dict[str, Any]:
    try:
        with folder.open(LEASE) as file:
            return dict(json.loads(file.read()))
    except (FileNotFoundError, ValueError, TypeError):  # ended, just begins, or rubbish
        return {}


def _place(there: dict[str, Any]) -> str:
    return f"process {there.get('process', '?')} on {there.get('host', 'another machine')}"


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return process != os.getpid()
