"""What becomes of a run when something dies, hangs, is cut off or is full: each event a function, and their table.

    bash launch/drill.sh [NAME ...]

Each drill begins a run on a head and two nodes, lets its event happen, waits until the run goes on, and stops it. The
checkpoint of that step is compared, byte for byte, with that of a run in one process which nothing disturbed. As root,
where there is iproute2, head and nodes are on hosts of their own: network namespaces with addresses of their own.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from command import TINY, last_checkpoint, last_step, lines_of, run, start, wait_until
from fleet import Fleet, can_have_hosts, ray_processes
from ray_nodes import kill_all

from dlops_dist.command_line import read_settings
from dlops_dist.data.pack import pack
from dlops_dist.data.shapes import write_tiny_imagenet
from dlops_dist.data.sources import TinyImageNet
from dlops_dist.engine import fit, prepare
from dlops_dist.events import Logged

TRAINED = [*TINY, "--loss", "center", "--blocks", "4", "--epochs", "4000", "--log-every", "1", "--name", "run"]
TRAINED += ["--exactness", "bits"]
SAMPLES = 20
"""In each step."""
ALL, ELASTIC = ("--workers", "3"), ("--workers", "3", "--min-workers", "1")
BOUND_S = {"worker": 20, "node": 45}
"""What a run may stand still for, by what is lost."""
PATIENCE_S = 900


class Drilled:
    """A run on a fleet that something happens to."""

    def __init__(self, fleet, shards, runs, *options):
        self.fleet, self.folder = fleet, runs / "run"
        self.command = ["train", "q1", "--data.shards", shards, *TRAINED]
        self.options = ["--checkpoint-every", "5", "--max-restarts", "20", *options, "--runs-dir", runs]
        self.told, self.printed = [], []
        """What its commands before, and the one under way, have printed."""

    def begin(self, *options):
        """Start the command, once more perhaps."""
        self.told = self.lines
        command = [*self.command, *self.options, *options]
        self.process = start(*command, env=self.fleet.cluster, within=self.fleet.within)
        self.printed = lines_of(self.process)

    @property
    def lines(self):
        return self.told + self.printed

    @property
    def step(self):
        return last_step(self.folder)

    @property
    def workers(self):
        """How many each beginning had, in turn."""
        return [int(number) for line in self.lines for number in re.findall(r" (\d) workers? on cpu", line)]

    def trains(self, *workers):
        """Wait until the last beginnings were with so many workers, in turn, and a step was taken since."""
        assert wait_until(lambda: self.workers[-len(workers) :] == [*workers], PATIENCE_S), "\n".join(self.lines)
        step = self.step
        assert wait_until(lambda: self.step > step, PATIENCE_S), "\n".join(self.lines)

    def stands_still(self, event: Callable[[], object], is_over: Callable[[], bool] | None = None):
        """The longest time without a step that was not taken before, from an event till one after it is over: by
        default, till the run has begun once more.
        """
        beginnings, best, since, longest = len(self.workers), self.step, time.monotonic(), 0.0
        is_over = is_over or (lambda: len(self.workers) > beginnings)
        deadline = since + PATIENCE_S
        with ThreadPoolExecutor(1) as pool:
            happened = pool.submit(event)
            while True:
                over = happened.done() and is_over()
                if happened.done():
                    happened.result()
                if (step := self.step) > best:
                    now = time.monotonic()
                    best, since, longest = step, now, max(longest, now - since)
                    if over:
                        return longest
                assert time.monotonic() < deadline, "\n".join(self.lines)
                time.sleep(0.03)

    def ends(self):
        """Wait until the command has ended by itself. Returns its exit code and its last line."""
        self.process.wait(timeout=PATIENCE_S)
        return self.process.returncode, self.printed[-1] if self.printed else ""

    def stop(self):
        """Stop it, the step saved. Returns the step."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=PATIENCE_S)
        assert self.process.returncode == 130, "\n".join(self.lines)
        return self.step

    def lost_or_repeated(self):
        """Samples of steps that are not there, or twice."""
        steps = [json.loads(line)["step"] for line in (self.folder / "steps.jsonl").read_text().splitlines()]
        return SAMPLES * (len(set(range(1, self.step + 1)) ^ set(steps)) + len(steps) - len(set(steps)))


def undisturbed(command, steps, folder):
    """{step: (name, bytes) of its checkpoint} of the run of a command in this process, which nothing disturbs."""
    at, found = [0], {}
    arguments = [str(part) for part in (*command[2:], "--runs-dir", folder)]

    def seen(event):
        if isinstance(event, Logged):
            at[0] = event.row["step"]

    def look():
        for step in set(steps) - found.keys():
            file = folder / f"run/checkpoints/step-{step:09d}.pt"
            if file.exists():
                found[step] = file.name, file.read_bytes()

    def is_wanted():
        look()
        return at[0] in steps

    with suppress(KeyboardInterrupt):
        settings = prepare("q1", read_settings("q1", arguments))
        fit(settings, listeners=[seen], stop=lambda: at[0] >= max(steps), save=is_wanted)
    look()
    return found


# events: each takes a run under way, and yields what happened and how long the run stood still for it


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


@dataclass(frozen=True)
class Drill:
    event: Callable[..., object]
    options: tuple[str, ...]
    bound_s: int | None = None
    needs: str = ""
    """root, where it is only possible there."""


DRILLS = {
    "worker-killed": Drill(worker_killed, ALL, BOUND_S["worker"]),
    "worker-stopped": Drill(worker_stopped, (*ALL, "--collective-timeout", "20")),
    "node-killed": Drill(node_killed, ELASTIC, BOUND_S["node"]),
    "node-back": Drill(node_killed_and_back, ELASTIC, BOUND_S["node"]),
    "link-20": Drill(link_cut(20), ELASTIC, needs="root"),
    "link-300": Drill(link_cut(300), ELASTIC, needs="root"),
    "driver-killed": Drill(driver_killed, ALL),
    "head-killed": Drill(head_killed, ALL),
    "disk-full": Drill(disk_full, ALL, needs="root"),
    "store-full": Drill(store_full, ALL),
    "preempted": Drill(preempted, ELASTIC, BOUND_S["node"]),
    "writing": Drill(workers_killed_while_writing, (*ALL, "--checkpoint-every", "1")),
}
SWEEP = "sweep"


def drill(name, fleet, shards, scratch):
    """What happened, each with its seconds; where it ended: step, checkpoint, samples lost or repeated; its command."""
    runs = scratch / "small" if name == "disk-full" else scratch / name
    drilled = Drilled(fleet, shards, runs, *DRILLS[name].options)
    drilled.begin()
    try:
        drilled.trains(3)
        happened = list(DRILLS[name].event(drilled))
        step = drilled.stop()
    finally:
        kill_all(drilled.process)
        for line in drilled.lines:
            if line.startswith(("warning: ", "error: ", "failed: ")):
                print(f"    {line}", flush=True)
    return happened, step, last_checkpoint(drilled.folder), drilled.lost_or_repeated(), drilled.command


def sweep_with_a_node_lost(fleet, shards, scratch):
    """A trial on each node; the same command takes up what was lost."""
    options = [*TINY, "--blocks", "4", "--epochs", "40", "--data.val-fraction", "0.25", "--log-every", "1"]
    options += ["--checkpoint-every", "5", "--name", "sweep"]
    space = ["--space", "optimizer.lr grid 0.02 0.015 0.01"]
    command = ["tune", "q1", "--data.shards", shards, *options, *space, "--runs-dir", scratch / "sweep"]
    sweep = scratch / "sweep/sweep"

    def steps():
        return [last_step(file.parent) for file in sorted(sweep.glob("*/steps.jsonl"))]

    process = start(*command, env=fleet.cluster, within=fleet.within)
    lines = lines_of(process)
    try:
        assert wait_until(lambda: len(steps()) == 3 and min(steps()) > 20, PATIENCE_S), "\n".join(lines)
        before, started = sum(steps()), time.monotonic()
        fleet.kill(1)
        assert wait_until(lambda: sum(steps()) > before, PATIENCE_S)
        seconds = time.monotonic() - started
        process.wait(timeout=PATIENCE_S)
    finally:
        kill_all(process)
    print(*(f"    {line}\n" for line in lines if line.startswith("warning: ")), end="", flush=True)
    code, output = run(*command, env=fleet.cluster, within=fleet.within, timeout_s=PATIENCE_S)
    assert code == 0, output
    equal = []
    for trial in sorted(path.parent for path in sweep.glob("*/config.yaml")):
        whole = scratch / "whole" / trial.name
        code, output = run("train", "q1", "--local", "--config", trial / "config.yaml", "--name", "run",
                           "--runs-dir", whole, timeout_s=PATIENCE_S)  # fmt: skip
        assert code == 0, output
        equal.append(last_checkpoint(trial) == last_checkpoint(whole / "run"))
    return seconds, equal == [True] * 3


@contextmanager
def small_disk(folder):
    """A folder on a file system of 100 MB, where we are root."""
    folder.mkdir()
    if not can_have_hosts():
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "none", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"by default all: {', '.join([*DRILLS, SWEEP])}")
    names = parser.parse_args().names or [*DRILLS, SWEEP]
    if unknown := [name for name in names if name not in DRILLS and name != SWEEP]:
        print(f"error: {', '.join(unknown)}: no such drill; there are {', '.join([*DRILLS, SWEEP])}", file=sys.stderr)
        return 2
    if left_out := [name for name in names if name in DRILLS and DRILLS[name].needs and not can_have_hosts()]:
        print(f"left out, as they need root and iproute2: {', '.join(left_out)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="drills-") as folder:
        return drilled_all([name for name in names if name not in left_out], Path(folder))


def drilled_all(names, scratch):
    """Print the table. Returns the exit code."""
    write_tiny_imagenet(scratch / "shapes.zip", train_per_class=24, test_per_class=6, size=32)
    shards = scratch / "shards"
    pack(TinyImageNet(scratch / "shapes.zip"), shards, "shapes", shard_size=100, workers=1)
    ended, rows, sweep = {}, [], None
    with small_disk(scratch / "small"), Fleet(scratch, 2, on_hosts=can_have_hosts()) as fleet:
        for name in names:
            for place in fleet.places:
                if not fleet.lives(place):
                    fleet.add(place)
            print(f"drill {name}", flush=True)
            if name == SWEEP:
                sweep = sweep_with_a_node_lost(fleet, shards, scratch)
                continue
            ended[name] = drill(name, fleet, shards, scratch)
            for what, seconds in ended[name][0]:
                print(f"  {what}: {seconds:.1f} s to the next step", flush=True)
    print("the same run, undisturbed", flush=True)
    if ended:
        whole = undisturbed(next(iter(ended.values()))[4], {step for _, step, *_ in ended.values()}, scratch / "one")
        for name, (happened, step, checkpoint, lost, _) in ended.items():
            rows += [(what, s, DRILLS[name].bound_s, lost, checkpoint == whole[step]) for what, s in happened]
    if sweep is not None:
        rows.append(("a sweep with a node lost, the same command", sweep[0], None, 0, sweep[1]))
    print(f"\n{'event':46}  next step  bound  samples lost or repeated  final bits")
    for what, seconds, bound_s, lost, equal in rows:
        bound = f"{bound_s} s" if bound_s else "-"
        print(f"{what:46}  {seconds:7.1f} s  {bound:>5}  {lost:24}  {'equal' if equal else 'NOT EQUAL'}")
    good = all(equal and not lost and (not bound or s <= bound) for _, s, bound, lost, equal in rows)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
