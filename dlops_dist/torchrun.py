"""A process that torchrun started, one of several with the same command."""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import uuid4

from dlops_dist.errors import RunError, first_line

TIMEOUT_S = 300
"""How long a process waits for the others, before it has read how long it is to wait."""
LOST = "onnection closed|onnection reset|roken pipe|imed out"
"""What torch says where another process has ended, or does not answer."""
POLL_S = 0.02
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

    from dlops_dist.distributed.interfaces import address_towards, use_interface_of
    from dlops_dist.engine.device import default_device, use

    use_interface_of(address_towards(os.environ["MASTER_ADDR"]))
    device, timeout = default_device(), timedelta(seconds=TIMEOUT_S)
    use(device)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(meeting(store, rank, size), store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    try:
        yield
    except BaseException as error:
        time.sleep(GRACE_S * (rank > 0))
        if isinstance(error, RuntimeError) and re.search(LOST, str(error)):
            raise RunError(f"rank {rank} has lost another: {first_line(error)}") from error
        raise
    finally:
        dist.destroy_process_group()


def wait_at_most(seconds: int) -> None:
    """How long this process waits for the others from now on."""
    import torch.distributed as dist

    world: Any = dist.group.WORLD
    world._get_backend(world._device_types[0])._set_default_timeout(timedelta(seconds=seconds))


def meeting(store: Any, rank: int, size: int) -> str:
    """A name that processes started together share, and no others.

    After a restart torchrun gives them the store of those before, where a process would find their addresses. So the
    first one names whom it has seen, until each has found itself named.
    """
    own = uuid4().hex
    store.set(f"here/{rank}", own)
    while rank:
        name, seen = json.loads(store.get("meeting"))
        if own in seen:
            store.set(f"agreed/{rank}", name)
            if store.check(["begun"]) and store.get("begun").decode() == name:
                return str(name)
        time.sleep(POLL_S)
    others = range(1, size)
    seen = []
    while True:
        now = [own, *(store.get(f"here/{other}").decode() for other in others)]
        if now != seen:
            name, seen = uuid4().hex, now
            store.set("meeting", json.dumps([name, seen]))
        agreed = [f"agreed/{other}" for other in others]
        if store.check(agreed) and all(store.get(key).decode() == name for key in agreed):
            store.set("begun", name)
            return name
        time.sleep(POLL_S)


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
