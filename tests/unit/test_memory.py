"""What a container may use is asked; what a process frees it keeps."""

import ctypes
import os
import subprocess
import sys

import pytest

from dlops_dist.data.memory import available_memory

NODE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/", {"memory.max": "5000000\n"}, 5_000_000),
        ("0::/", {"memory.max": "max\n"}, NODE),
        ("0::/pod/job", {"pod/memory.max": "4000\n", "pod/job/memory.max": "6000\n"}, 4000),
        ("0::/pod/job", {"pod/job/memory.max": "max\n"}, NODE),
        ("9:cpu:/\n4:memory:/docker/1\n0::/", {"memory/docker/1/memory.limit_in_bytes": "7000\n"}, 7000),
        ("4:cpuset,memory:/docker/1", {"memory/memory.limit_in_bytes": "8000\n"}, 8000),
        ("4:memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, NODE),
        ("3:cpu:/x", {"memory/x/memory.limit_in_bytes": "1\n"}, NODE),
        ("", {}, NODE),
    ],
)
def test_the_least_limit_of_the_control_groups_counts(groups, limits, expected, tmp_path):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    for name, text in limits.items():
        path = tmp_path / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert available_memory(tmp_path) == expected


def test_a_system_without_control_groups_has_the_memory_of_the_node(tmp_path):
    assert available_memory(tmp_path) == NODE


CODE = """
import resource, sys
from dlops_dist.data.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    before = faults()
    bytearray(2**27)
print(faults() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc alone can")
def test_freed_memory_is_used_again():
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, check=True).stdout)
        for how in ("keep", "")
    )
    assert kept < 100 < given_back
