"""Memory of this process: how much there is, and what becomes of it once it is freed."""

import ctypes
import os
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 2**30
"""Bytes of a block; larger ones are given back when they are freed."""


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for what it needs next. With glibc; elsewhere nothing happens.

    Each training step allocates batches and activations of megabytes and frees them again. By default glibc gives
    such blocks back at once, and the next step gets them zeroed, page by page: half of the time of reading decoded
    images, a twentieth of a ResNet's step on a CPU. The process then stays as large as it was at its largest.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST_KEPT)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of this node's memory, or what its container is limited to (control groups, version 1 or 2)."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = root / "sys/fs/cgroup", "memory.max"
        if controllers:
            top, name = top / "memory", "memory.limit_in_bytes"
        group = Path(path.lstrip("/"))
        for limit in (top / part / name for part in (group, *group.parents)):  # the least of all groups around it
            if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
                sizes.append(int(text))
    return min(sizes)
