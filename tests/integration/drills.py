"""What becomes of a run when something dies, hangs, is cut off or is full: a table of drills.

    bash launch/drill.sh [NAME ...]

Each drill begins a run on a head and two nodes, lets its event happen, waits until the run goes on, and stops it. The
checkpoint of that step is compared, byte for byte, with that of a run in one process which nothing disturbed. As root,
where there is iproute2, head and nodes are on hosts of their own: network namespaces with addresses of their own.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import happenings
from command import TINY, last_checkpoint, last_step, lines_of, run, start, wait_until
from drilled import PATIENCE_S, Drilled, lost_or_repeated, undisturbed
from fleet import Fleet, can_have_hosts
from ray_nodes import kill_all

from dlops_dist.data.pack import pack
from dlops_dist.data.shapes import write_tiny_imagenet
from dlops_dist.data.sources import TinyImageNet

ALL, ELASTIC = ("--workers", "3"), ("--workers", "3", "--min-workers", "1")
WORKER_S, NODE_S = 20, 45
"""How long a run may stand still for one that is lost."""


@dataclass(frozen=True)
class Drill:
    event: Callable[..., object]
    options: tuple[str, ...]
    bound_s: int | None = None
    needs: str = ""
    """root, where it is only possible there."""


DRILLS = {
    "worker-killed": Drill(happenings.worker_killed, ALL, WORKER_S),
    "worker-stopped": Drill(happenings.worker_stopped, (*ALL, "--collective-timeout", "20")),
    "node-killed": Drill(happenings.node_killed, ELASTIC, NODE_S),
    "node-back": Drill(happenings.node_killed_and_back, ELASTIC, NODE_S),
    "link-20": Drill(happenings.link_cut(20), ELASTIC, needs="root"),
    "link-300": Drill(happenings.link_cut(300), ELASTIC, needs="root"),
    "driver-killed": Drill(happenings.driver_killed, ALL),
    "controller-killed": Drill(happenings.controller_killed, ALL),
    "head-killed": Drill(happenings.head_killed, ALL),
    "disk-full": Drill(happenings.disk_full, ALL, needs="root"),
    "store-full": Drill(happenings.store_full, ALL),
    "preempted": Drill(happenings.preempted, ELASTIC, NODE_S),
    "writing": Drill(happenings.workers_killed_while_writing, (*ALL, "--checkpoint-every", "1")),
}
SWEEP = "sweep"


@dataclass(frozen=True)
class End:
    """Of a drill."""

    happened: list[tuple[str, float]]
    """Each event with the seconds to the next step."""
    lost: int
    """Samples that were lost or repeated."""
    step: int = 0
    checkpoint: tuple[str, bytes] = ("", b"")
    """Of that step, with its name."""
    equal: bool = False
    """Whether a sweep's trials ended with the undisturbed bits."""


def drill(name, fleet, shards, scratch):
    """Let the event of a drill happen to a run."""
    runs = scratch / "small" if name == "disk-full" else scratch / name
    drilled = Drilled(fleet, shards, runs, *DRILLS[name].options)
    drilled.begin()
    try:
        drilled.trains(3)
        happened = []
        for what, seconds in DRILLS[name].event(drilled):
            happened.append((what, seconds))
            print(f"  {what}: {seconds:.1f} s to the next step", flush=True)
        step = drilled.stop()
    finally:
        kill_all(drilled.process)
        said = [line for line in drilled.lines if line.startswith(("warning: ", "error: ", "failed: "))]
        print(*(f"    {line}\n" for line in said), sep="", end="", flush=True)
    return End(happened, lost_or_repeated(drilled.folder), step, last_checkpoint(drilled.folder))


def sweep_with_a_node_lost(name, fleet, shards, scratch):
    """A trial on each node; the same command takes up what was lost."""
    options = [*TINY, "--blocks", "4", "--epochs", "40", "--data.val-fraction", "0.25", "--log-every", "1"]
    options += ["--checkpoint-every", "5", "--name", "sweep", "--runs-dir", scratch / name]
    space = ["--space", "optimizer.lr grid 0.02 0.015 0.01"]
    command = ["tune", "q1", "--data.shards", shards, *options, *space]
    sweep = scratch / name / "sweep"

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
    return End([("node lost in a sweep, the same command", seconds)], lost, equal=equal == [True] * 3)


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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing is left behind
    with tempfile.TemporaryDirectory(prefix="drills-", ignore_cleanup_errors=True) as folder:
        return drilled_all([name for name in names if name not in left_out], Path(folder))


def drilled_all(names, scratch):
    """Print the table. Returns the exit code."""
    write_tiny_imagenet(scratch / "shapes.zip", train_per_class=24, test_per_class=6, size=32)
    shards = scratch / "shards"
    pack(TinyImageNet(scratch / "shapes.zip"), shards, "shapes", shard_size=100, workers=1)
    ended, failed = {}, []
    with small_disk(scratch / "small"), Fleet(scratch, 2, on_hosts=can_have_hosts()) as fleet:
        for name in names:
            print(f"drill {name}", flush=True)
            try:
                for place in fleet.places:
                    if not fleet.lives(place):
                        fleet.add(place)
                ended[name] = (sweep_with_a_node_lost if name == SWEEP else drill)(name, fleet, shards, scratch)
            except KeyboardInterrupt:
                failed.append((name, "interrupted"))
                break
            except Exception as error:  # told, and the others go on
                traceback.print_exc()
                failed.append((name, error))
    print("the same runs, undisturbed", flush=True)
    rows = rows_of(ended, scratch)
    print(f"\n{'event':46}  next step  bound  samples lost or repeated  final bits")
    for what, seconds, bound_s, lost, equal in rows:
        bound = f"{bound_s} s" if bound_s else "-"
        print(f"{what:46}  {seconds:7.1f} s  {bound:>5}  {lost:24}  {'equal' if equal else 'NOT EQUAL'}")
    for name, error in failed:
        print(f"{name} failed: {str(error).splitlines()[:1]}")
    good = all(equal and not lost and (not bound or s <= bound) for _, s, bound, lost, equal in rows)
    return 0 if good and not failed else 1


def rows_of(ended, scratch):
    """(event, seconds, bound, samples lost or repeated, whether the final bits are equal) of each event."""
    trained = {name: end for name, end in ended.items() if name != SWEEP}
    whole = undisturbed(scratch / "shards", {end.step for end in trained.values()}, scratch / "one")
    rows = []
    for name, end in ended.items():
        equal = end.equal if name == SWEEP else end.checkpoint == whole[end.step]
        bound_s = None if name == SWEEP else DRILLS[name].bound_s
        rows += [(what, seconds, bound_s, end.lost, equal) for what, seconds in end.happened]
    return rows


if __name__ == "__main__":
    sys.exit(main())
