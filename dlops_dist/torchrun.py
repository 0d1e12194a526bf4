"""A process that torchrun started, one of several with the same command."""

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from dlops_dist.errors import RunError, first_line

TIMEOUT_S = 300
"""How long a process waits for the others in a collective."""
LOST = "onnection closed|onnection reset|roken pipe|imed out"
"""What torch says where another process has ended, or does not answer."""
GRACE_S = 5
"""What the first process has to say what all of them met, before torchrun ends the others."""


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def joined() -> Iterator[None]:
    """In the group of torchrun's processes, where it started this one. What all of them meet is said once."""
    if not started_by_torchrun():
        yield
        return
    import torch.distributed as dist

    from dlops_dist.engine.device import default_device, use

    device = default_device()
    use(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=TIMEOUT_S))
    rank = dist.get_rank()
    try:
        yield
    except BaseException as error:
        time.sleep(GRACE_S * (rank > 0))
        if isinstance(error, RuntimeError) and re.search(LOST, str(error)):
            raise RunError(f"rank {rank} has lost another: {first_line(error)}") from error
        raise
    finally:
        dist.destroy_process_group()


@contextmanager
def first_rank_first() -> Iterator[None]:
    """The first process does it, then the others: they begin nothing that it has refused."""
    if not started_by_torchrun():
        yield
        return
    import torch.distributed as dist

    rank = dist.get_rank()
    try:
        if rank:
            dist.barrier()
    except RuntimeError:  # the first one has ended, and said why
        sys.exit()
    yield
    if not rank:
        dist.barrier()
