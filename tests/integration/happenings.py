"""What may happen to a run: each a function that takes one under way, and yields what happened and how many seconds it
was to the next step.
"""

import os
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil
from command import wait_until
from drilled import PATIENCE_S
from fleet import ray_processes
from ray_nodes import kill_all


def worker_processes():
    return ray_processes("RayTrainWorker")


def worker_killed(drilled):
    yield "worker killed", drilled.stands_still(worker_processes()[-1].kill)


def worker_stopped(drilled):
    victim = worker_processes()[-1]
    try:
        yield "worker stopped (SIGSTOP)", drilled.stands_still(victim.suspend)
    finally:
        with suppress(psutil.NoSuchProcess):
            victim.kill()


def node_killed(drilled):
    yield "node killed, never back: shrinks", drilled.stands_still(lambda: drilled.fleet.kill(1))


def node_killed_and_back(drilled):
    yield "node killed: shrinks", drilled.stands_still(lambda: drilled.fleet.kill(1))
    yield "and back: grows", drilled.stands_still(lambda: drilled.fleet.add(1))


def link_cut(seconds):
    def event(drilled):
        mended = threading.Event()

        def cut():
            drilled.fleet.cut(1)
            time.sleep(seconds)
            drilled.fleet.mend(1)
            mended.set()

        yield f"link cut for {seconds} s", drilled.stands_still(cut, mended.is_set)
        if not drilled.fleet.lives(1):
            yield "its node started again: grows", drilled.stands_still(lambda: drilled.fleet.add(1))

    return event


def driver_killed(drilled):
    def again():
        drilled.process.kill()
        drilled.process.wait()
        drilled.begin()

    yield "driver killed, the same command", drilled.stands_still(again)


def controller_killed(drilled):
    """The process that starts the workers, and starts them again."""

    def again():
        ray_processes("TrainController")[0].kill()
        drilled.ends()
        drilled.begin()

    yield "Ray's controller killed, the same command", drilled.stands_still(again)


def head_killed(drilled):
    def again():
        drilled.fleet.end()
        drilled.ends()
        drilled.fleet.begin()
        drilled.begin()

    yield "head killed, the same command on a new one", drilled.stands_still(again)


def disk_full(drilled):
    filler = drilled.folder.parent / "filler"

    def fill_and_free():
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        drilled.ends()
        filler.unlink()
        drilled.begin()

    yield "disk full, room made, the same command", drilled.stands_still(fill_and_free)


FILL = """
import sys, numpy, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
ray.init(logging_level="ERROR")
@ray.remote(num_cpus=0)
class Filler:
    def fill(self):
        self.kept = [ray.put(numpy.ones(10**7, numpy.uint8)) for _ in range(15)]
        self.used = [ray.get(kept) for kept in self.kept]
        return len(self.used)
there = [Filler.options(scheduling_strategy=On(n["NodeID"], soft=False)).remote() for n in ray.nodes() if n["Alive"]]
print("full", ray.get([filler.fill.remote() for filler in there]), flush=True)
sys.stdin.read()
"""


def store_full(drilled):
    """Half as much again as it holds, all in use; a worker that is killed meanwhile starts without it."""
    filler = subprocess.Popen(
        [*drilled.fleet.within, sys.executable, "-c", FILL], env={**os.environ, **drilled.fleet.cluster}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield (
            "object store full",
            drilled.stands_still(lambda: any(line.startswith("full") for line in filler.stdout), lambda: True),
        )
        yield "and a worker killed meanwhile", drilled.stands_still(worker_processes()[-1].kill)
    finally:
        kill_all(filler)


def preempted(drilled):
    yield "preemption notice: shrinks", drilled.stands_still(lambda: drilled.fleet.drain(2, 6))
    drilled.fleet.kill(2)


def workers_killed_while_writing(drilled):
    """All of them, until one was at it."""
    partial = drilled.folder / "checkpoints/.partial"

    def kill():
        while True:
            victims = worker_processes()
            assert wait_until(partial.exists, PATIENCE_S, every_s=0.0005)
            for victim in victims:
                victim.kill()
            time.sleep(0.5)
            if partial.exists():
                return
            beginnings = len(drilled.workers)
            assert wait_until(lambda before=beginnings: len(drilled.workers) > before, PATIENCE_S)

    yield "workers killed while a checkpoint is written", drilled.stands_still(kill)
