"""Ranks that are kept: for each number of them a world of processes, which calls one function after another.

`run_ranks` starts new processes for each call, which then compute for less time than that takes. Between two calls a
kept rank goes back to the seeds and switches of a new one; what a function changes in a module it changes back itself.
"""

import atexit
import ctypes
import gc
import multiprocessing
import random
import tempfile
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np

from dlops_dist.distributed.ranks import PRELOADED, _outcomes
from dlops_dist.errors import RunError

WORLDS = {}


def on_ranks(function, world_size, *arguments, timeout_s=90):
    """[function(*arguments) on rank 0, on rank 1, ...], as by `run_ranks`; with a rank that failed its world ends."""
    if world_size not in WORLDS:
        WORLDS[world_size] = World(world_size)
    outcomes = WORLDS[world_size].call(function, arguments, timeout_s)
    failures = [f"rank {rank}: {value}" for rank, (succeeded, value) in enumerate(outcomes) if not succeeded]
    if failures:
        WORLDS.pop(world_size).end(wait_s=0)
        raise RunError("\n".join(failures))
    return [value for _, value in outcomes]


class World:
    """Processes of one gloo group, each with one thread."""

    def __init__(self, size):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            store = Path(self.folder.name) / "rendezvous"
            self.processes.append(context.Process(target=serve, args=(theirs, store, rank, size)))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(ours)

    def call(self, function, arguments, timeout_s):
        for pipe in self.pipes:
            with suppress(BrokenPipeError):  # it died between two calls, which the outcome says
                pipe.send((function, arguments))
        return _outcomes(self.pipes, time.monotonic() + timeout_s)

    def end(self, wait_s):
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(wait_s)
            process.kill()
            process.join()
        self.folder.cleanup()


@atexit.register
def end_all():
    for world in WORLDS.values():
        world.end(wait_s=5)


def serve(pipe, store, rank, world_size):
    """What a rank does until its pipe is closed."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", f"file://{store}", timeout=timedelta(seconds=60), rank=rank, world_size=world_size)
    seeds = torch.get_rng_state(), np.random.get_state(), random.getstate()
    with suppress(EOFError):
        while True:
            function, arguments = pipe.recv()
            as_new(*seeds)
            try:
                outcome = True, function(*arguments)
            except Exception:
                outcome = False, traceback.format_exc()
            pipe.send(outcome)
            del function, arguments, outcome
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # ranks of every number are kept: nine processes


def as_new(torchs, numpys, pythons):
    """Undo what a function may leave behind."""
    import torch

    torch.set_rng_state(torchs)
    np.random.set_state(numpys)
    random.setstate(pythons)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.compiler.reset()
