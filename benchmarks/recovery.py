"""P11: how long a run stands still after a worker is killed, or a node lost: to its next step.

    python benchmarks/recovery.py [--runs 3]

A head with one CPU and a node with another, on this machine; q1 on generated images, two workers, a checkpoint every
four steps. First a worker gets SIGKILL, then, in a run with --min-workers 1, the node.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

from dlops_dist.data.pack import pack
from dlops_dist.data.shapes import write_tiny_imagenet
from dlops_dist.data.sources import TinyImageNet

COMMON = ["--epochs", "1000", "--checkpoint-every", "4", "--model.stem", "imagenet", "--model.width", "8"]
COMMON += ["--global-batch-size", "20", "--blocks", "2", "--workers", "2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as scratch:
        write_tiny_imagenet(Path(scratch) / "shapes.zip", train_per_class=24, test_per_class=6, size=32)
        pack(TinyImageNet(Path(scratch) / "shapes.zip"), Path(scratch) / "shards", "shapes", workers=1)
        killed = [stands_still(Path(scratch), f"worker-{run}", lose_node=False) for run in range(runs)]
        print(f"a worker killed: {statistics.median(killed):5.1f} s to the next step {[round(s, 1) for s in killed]}")
        lost = [stands_still(Path(scratch), f"node-{run}", lose_node=True) for run in range(runs)]
        print(f"a node lost:     {statistics.median(lost):5.1f} s to the next step {[round(s, 1) for s in lost]}")


def stands_still(scratch: Path, name: str, lose_node: bool) -> float:
    """Seconds from the loss to the first checkpoint that was not there."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    node = cluster.add_node(num_cpus=1)
    command = [sys.executable, "-m", "dlops_dist.train", "q1", "--data.shards", str(scratch / "shards")]
    command += ["--runs-dir", str(scratch / "runs"), "--name", name, *COMMON]
    process = subprocess.Popen(
        command + ["--min-workers", "1"] * lose_node, env={**os.environ, "RAY_ADDRESS": cluster.address},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    checkpoints = scratch / "runs" / name / "checkpoints"
    try:
        wait_for_step_after(40, checkpoints)
        started = time.monotonic()
        if lose_node:
            cluster.remove_node(node, allow_graceful=False)
        else:
            next(p for p in psutil.process_iter() if "ray::RayTrainWorker" in p.name()).send_signal(signal.SIGKILL)
        time.sleep(0.5)  # a checkpoint may be under way
        wait_for_step_after(latest(checkpoints), checkpoints)
        return time.monotonic() - started
    finally:
        process.kill()
        process.wait()
        cluster.shutdown()


def wait_for_step_after(step: int, checkpoints: Path) -> None:
    deadline = time.monotonic() + 180
    while latest(checkpoints) <= step:
        if time.monotonic() > deadline:
            raise SystemExit(f"no step in {checkpoints} for three minutes")
        time.sleep(0.05)


def latest(checkpoints: Path) -> int:
    return max((int(path.stem.removeprefix("step-")) for path in checkpoints.glob("step-*.pt")), default=0)


if __name__ == "__main__":
    main()
