"""Runs a function on several ranks of this machine, each a process of its own. A hang is a failure, not a wait."""

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

from dlops_dist.errors import RunError
from dlops_dist.files import temporary_folder
from dlops_dist.sockets import leave_room_for_sockets

PRELOADED = ["torch", "torch._dynamo", "torch.nn.parallel", "pandas", "pyarrow.parquet", "dlops_dist.engine"]
"""Imported once, in the server that the ranks are forked from: what a step, the optimiser and the index need."""
GRACE_S = 2
"""What a failed rank's peers have left: they wait for it in a collective, or fail on their own."""


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float = 90) -> list[Any]:
    """[function(*arguments) on rank 0, on rank 1, ...] of a gloo group, each rank with one thread.

    The function, its arguments and results are pickled: it must be importable.

    Raises:
        RunError: a rank failed, died or hung; the others are ended with it. Names each of them.
    """
    leave_room_for_sockets()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory(dir=temporary_folder()) as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            store = Path(folder) / "rendezvous"
            process = context.Process(target=_on_rank, args=(theirs, store, rank, world_size, function, arguments))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            outcomes = _outcomes(pipes, deadline)
        finally:
            for process in processes:
                process.kill()
                process.join()
    failures = [f"rank {rank}: {value}" for rank, (succeeded, value) in enumerate(outcomes) if not succeeded]
    if failures:
        raise RunError("\n".join(failures))
    return [value for _, value in outcomes]


def _outcomes(pipes: list[Any], deadline: float) -> list[tuple[bool, Any]]:
    """(True, result) or (False, why not) of each rank."""
    outcomes: dict[Any, tuple[bool, Any]] = {}
    while len(outcomes) < len(pipes) and (left := deadline - time.monotonic()) > 0:
        ready: list[Any] = connection.wait([pipe for pipe in pipes if pipe not in outcomes], left)
        for pipe in ready:
            try:
                outcomes[pipe] = pipe.recv()
            except EOFError:
                outcomes[pipe] = False, "died"
            if not outcomes[pipe][0]:
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return [outcomes.get(pipe, (False, "hangs")) for pipe in pipes]


def _on_rank(
    pipe: Any, store: Path, rank: int, world_size: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", f"file://{store}", timeout=timedelta(seconds=60), rank=rank, world_size=world_size
        )
        pipe.send((True, function(*arguments)))
    except Exception:
        pipe.send((False, traceback.format_exc()))
    time.sleep(60)  # the parent ends all ranks together: an early exit would break a peer's last collective
