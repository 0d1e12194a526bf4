"""P6: training steps of two workers, under Ray and torchrun, against bare DDP under torchrun. A CPU core for each.

    python benchmarks/workers.py [--workers 2] [--batch 128] [--runs 3]

Ours is `train q1` on generated 64x64 images, decoded beforehand: reading, crop, flip and normalise, loss, schedule and
metrics count, evaluation does not; images/s are those of its rows, the first epoch left out. The bare loop is
torchvision's resnet18 under torch's DDP, cross-entropy and SGD, on images that are normalised already, its batch norm
local. Ours is computed in blocks, to the same bits on any number of workers; beside them norms over all ranks. Ray's
own processes, a dozen, share the cores where there are two: under torchrun both sides have the same.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from torch.nn import functional as F

from dlops_dist.data.memory import keep_freed_memory
from dlops_dist.data.pack import pack
from dlops_dist.data.shapes import write_tiny_imagenet
from dlops_dist.data.sources import TinyImageNet

STEPS, EPOCHS = 20, 4
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128, help="of all workers together")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    if "RANK" in os.environ:  # this process is one of torchrun's
        bare_ddp(arguments.batch // arguments.workers)
        return
    names = [
        "ours under torchrun, in blocks",
        "bare DDP",
        "ours under Ray, in blocks",
        "ours under Ray, norms over all",
    ]
    found: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        write_tiny_imagenet(Path(scratch) / "shapes.zip", arguments.batch * STEPS // 10, test_per_class=2, size=64)
        pack(TinyImageNet(Path(scratch) / "shapes.zip"), Path(scratch) / "shards", "shapes")
        for run in range(arguments.runs):
            for name, rates in found.items():
                rates.extend(bare(arguments) if name == "bare DDP" else ours(arguments, Path(scratch), name, run))
                print(f"run {run}: {name}: {[round(rate, 1) for rate in rates[-EPOCHS + 1 :]]} images/s", flush=True)
    rates = {name: statistics.median(of_epochs) for name, of_epochs in found.items()}
    for name, rate in rates.items():
        print(f"{name}: {rate:.1f} images/s, {rate / rates['bare DDP']:.3f} of bare DDP")


def ours(arguments: argparse.Namespace, scratch: Path, name: str, run: int) -> list[float]:
    """Images/s of each epoch but the first."""
    norm = "block" if "blocks" in name else "sync"
    launcher = torchrun(arguments) if "torchrun" in name else [sys.executable]
    run_name = f"{norm}-{len(launcher)}-{run}"
    command = [*launcher, "-m", "dlops_dist.train", "q1", "--workers", str(arguments.workers), "--name"]
    command += [run_name, "--runs-dir", str(scratch / "runs"), "--data.shards", str(scratch / "shards")]
    command += ["--data.cache-dir", str(scratch / "cache"), "--data.reader", "decoded", "--epochs", str(EPOCHS)]
    command += ["--model.stem", "imagenet", "--model.norm", norm, "--global-batch-size", str(arguments.batch)]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, env=ONE_THREAD)
    lines = (scratch / f"runs/{run_name}/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train_images_per_s"] for line in lines[1:]]


def torchrun(arguments: argparse.Namespace) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return [*launcher, str(arguments.workers)]


def bare(arguments: argparse.Namespace) -> list[float]:
    command = [*torchrun(arguments), __file__, "--workers", str(arguments.workers), "--batch", str(arguments.batch)]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    return [arguments.batch * STEPS / float(line) for line in output.split()][1:]


def bare_ddp(batch_size: int) -> None:
    """Print the seconds of each epoch, on rank 0."""
    keep_freed_memory()
    torch.distributed.init_process_group("gloo")
    model = torchvision.models.resnet18(num_classes=10).to(memory_format=torch.channels_last)
    network = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    images = torch.randn(batch_size, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,))
    for _ in range(EPOCHS):
        started = time.monotonic()
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
        if torch.distributed.get_rank() == 0:
            print(time.monotonic() - started, flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
