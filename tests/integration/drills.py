"""What becomes of a run when something dies, hangs, is cut off or is full: a table of drills.

    bash launch/drill.sh [NAME ...]

A run on a head and two nodes: one event after another happens to it, each time it is waited for until the run goes on,
and at last it is stopped. The checkpoint of that step is compared, byte for byte, with that of a run in one process
which nothing disturbed. As root,
where there is iproute2, head and nodes are on hosts of their own: network namespaces with addresses of their own.
"""

import argparse
import math
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import happenings
from command import TINY, last_checkpoint, last_step, lines_of, run, start, wait_until
from drilled import PATIENCE_S, Drilled, lost_or_repeated, undisturbed
from fleet import Fleet, can_have_hosts
from ray_nodes import kill_all

from dlops_dist.data.pack import pack
from dlops_dist.data.shapes import write_tiny_imagenet
from dlops_dist.data.sources import TinyImageNet
from dlops_dist.errors import first_line

ELASTIC = ("--workers", "3", "--min-workers", "1")
WORKER_S, NODE_S = 20, 45
"""How long a run may stand still for one that is lost."""


@dataclass(frozen=True)
class Drill:
    event: Callable[..., object]
    bound_s: int | None = None
    options: tuple[str, ...] = ("--collective-timeout", "20")
    """Drills of the same ones happen to one run, in turn."""
    needs_root: bool = False


DRILLS = {
    "worker-killed": Drill(happenings.worker_killed, WORKER_S),
    "worker-stopped": Drill(happenings.worker_stopped),
    "node-back": Drill(happenings.node_killed_and_back, NODE_S),
    "preempted": Drill(happenings.preempted, NODE_S),
    "driver-killed": Drill(happenings.driver_killed),
    "writing": Drill(happenings.workers_killed_while_writing),
    "disk-full": Drill(happenings.disk_full, needs_root=True),
    "controller-killed": Drill(happenings.controller_killed),
    "store-full": Drill(happenings.store_full),
    "head-killed": Drill(happenings.head_killed),
    "node-killed": Drill(happenings.node_killed, NODE_S),
    "link-20": Drill(happenings.link_cut(20), options=(), needs_root=True),
    "link-300": Drill(happenings.link_cut(300), options=(), needs_root=True),
}
SWEEP = "sweep"


@dataclass
class End:
    """Of a run that drills happened to, or a sweep."""

    happened: list[tuple[str, float, int | None]] = field(default_factory=list)
    """Each event with the seconds to the next step, and their bound."""
    lost: int = 0
    """Samples that were lost or repeated."""
    checkpoint: tuple[str, bytes] = ("", b"")
    """The last one, of a run."""
    equal: bool = False
    """Whether it ended with the undisturbed bits."""
    interrupted: bool = False


def drill(names, fleet, shards, runs):
    """Let drills of the same options happen to a run, in turn."""
    end, drilled = End(), Drilled(fleet, shards, runs, *ELASTIC, *DRILLS[names[0]].options)
    drilled.begin()
    try:
        for name in names:
            for place in fleet.places:
                if not fleet.lives(place):
                    fleet.add(place)
            drilled.trains(3)
            print(f"drill {name}", flush=True)
            for what, seconds in DRILLS[name].event(drilled):
                end.happened.append((what, seconds, DRILLS[name].bound_s))
                print(f"  {what}: {seconds:.1f} s to the next step", flush=True)
    except (Exception, KeyboardInterrupt) as error:  # told; what happened before is compared
        traceback.print_exc()
        end.happened.append((f"{name} failed: {first_line(error)}", math.inf, 0))
        end.interrupted = isinstance(error, KeyboardInterrupt)
    finally:
        said = [line for line in drilled.lines if line.startswith(("warning: ", "error: ", "failed: "))]
        print(*(f"    {line}\n" for line in said), sep="", end="", flush=True)
    try:
        drilled.stop()
    except Exception as error:
        end.happened.append((f"the run did not stop: {first_line(error)}", math.inf, 0))
    finally:
        kill_all(drilled.process)
    if drilled.step:
        end.lost, end.checkpoint = lost_or_repeated(drilled.folder), last_checkpoint(drilled.folder)
    return end


def sweep_with_a_node_lost(fleet, shards, scratch):
    """A trial on each node; the same command takes up what was lost."""
    options = [*TINY, "--blocks", "4", "--epochs", "40", "--data.val-fraction", "0.25", "--log-every", "1"]
    options += ["--checkpoint-every", "5", "--name", "sweep", "--runs-dir", scratch / "tune"]
    space = ["--space", "optimizer.lr grid 0.02 0.015 0.01"]
    command = ["tune", "q1", "--data.shards", shards, *options, *space]
    sweep = scratch / "tune/sweep"

    def steps():
        return [last_step(file.parent) for file in sorted(sweep.glob("*/steps.jsonl"))]

    for place in fleet.places:
        if not fleet.lives(place):
            fleet.add(place)
    print(f"drill {SWEEP}", flush=True)
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
        print(*(f"    {line}\n" for line in lines if line.startswith("warning: ")), sep="", end="", flush=True)
    code, output = run(*command, env=fleet.cluster, within=fleet.within, timeout_s=PATIENCE_S)
    assert code == 0, output
    equal, lost = [], 0
    for trial in sorted(path.parent for path in sweep.glob("*/config.yaml")):
        whole = scratch / "whole" / trial.name
        options = ["--config", trial / "config.yaml", "--name", "run", "--runs-dir", whole]
        code, output = run("train", "q1", "--local", *options, timeout_s=PATIENCE_S)
        assert code == 0, output
        equal.append(last_checkpoint(trial) == last_checkpoint(whole / "run"))
        lost += lost_or_repeated(trial)
    return End([("node lost in a sweep, the same command", seconds, None)], lost, equal=equal == [True] * 3)


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
    if left_out := [name for name in names if name in DRILLS and DRILLS[name].needs_root and not can_have_hosts()]:
        print(f"left out, as they need root and iproute2: {', '.join(left_out)}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing is left behind
    with tempfile.TemporaryDirectory(prefix="drills-", ignore_cleanup_errors=True) as folder:
        return drilled_all([name for name in names if name not in left_out], Path(folder))


def drilled_all(names, scratch):
    """Print the table. Returns the exit code."""
    write_tiny_imagenet(scratch / "shapes.zip", train_per_class=24, test_per_class=6, size=32)
    shards = scratch / "shards"
    pack(TinyImageNet(scratch / "shapes.zip"), shards, "shapes", shard_size=100, workers=1)
    groups = {}
    for name in names:
        groups.setdefault(SWEEP if name == SWEEP else DRILLS[name].options, []).append(name)
    with small_disk(scratch / "small"), Fleet(scratch, 2, on_hosts=can_have_hosts()) as fleet:
        ends = []
        for place, (options, group) in enumerate(groups.items()):
            if options == SWEEP:
                ends.append(sweep_with_a_node_lost(fleet, shards, scratch))
            else:
                ends.append(drill(group, fleet, shards, scratch / "small" / str(place)))
            if ends[-1].interrupted:
                break
    print("the same runs, undisturbed", flush=True)
    trained = [(int(re.findall(r"\d+", end.checkpoint[0])[0]), end) for end in ends if end.checkpoint[0]]
    whole = undisturbed(shards, {step for step, _ in trained}, scratch / "one")
    for step, end in trained:
        end.equal = end.checkpoint == whole[step]
    print(f"\n{'event':46}  next step  bound  samples lost or repeated  final bits")
    for end in ends:
        for what, seconds, bound_s in end.happened:
            bound = f"{bound_s} s" if bound_s else "-"
            bits = "equal" if end.equal else "NOT EQUAL"
            print(f"{what:46}  {seconds:7.1f} s  {bound:>5}  {end.lost:24}  {bits}")
    late = any(seconds > bound_s for end in ends for _, seconds, bound_s in end.happened if bound_s is not None)
    return int(late or not all(end.equal and not end.lost for end in ends))


if __name__ == "__main__":
    sys.exit(main())
