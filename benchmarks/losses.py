"""P8 and P9: batch-hard triplet and centre loss, forward and backward, against what is usual.

    python benchmarks/losses.py [--runs 5]

Triplet: pytorch-metric-learning's batch-hard miner and triplet margin loss, the same distance (Euclidean, raw). Centre
loss: the usual port, which computes all N x C distances and keeps the centres as a parameter of a second SGD.
Memory is the growth of the process's peak, each side in a process of its own.
"""

import argparse
import multiprocessing
from pathlib import Path

import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner
from pytorch_metric_learning.reducers import MeanReducer
from timing import alternate

from dlops_dist.losses import CenterLoss, TripletLoss

MARGIN, SAMPLES_PER_CLASS = 0.5, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    for shape in ((4096, 512), (1024, 128)):
        compare(f"P8 batch-hard triplet {shape[0]} x {shape[1]}", triplet_sides, shape, runs)
    for shape in ((512, 512, 200), (512, 512, 100_000)):
        compare(f"P9 centre loss B={shape[0]} D={shape[1]} C={shape[2]}", center_sides, shape, runs)


def compare(name, sides, shape, runs) -> None:
    ours, theirs = sides(*shape)
    value, other = ours(), theirs()
    ours_s, theirs_s = alternate(ours, theirs, runs)
    context = multiprocessing.get_context("spawn")
    with context.Pool(2, maxtasksperchild=1) as pool:
        memory = pool.starmap(peak_growth, [(sides, shape, 0), (sides, shape, 1)], chunksize=1)
    print(
        f"{name}: ours {1e3 * ours_s:.1f} ms, {memory[0]:.0f} MB; theirs {1e3 * theirs_s:.1f} ms, {memory[1]:.0f} MB; "
        f"{theirs_s / ours_s:.1f} x faster, {memory[0] / max(memory[1], 1):.2f} of the memory; "
        f"values {value:.6f}, {other:.6f}"
    )


def peak_growth(sides, shape, which) -> float:
    """MB by which one call raises the peak of this process."""
    run = sides(*shape)[which]
    sides(64, *(8 for _ in shape[1:]))[which]()  # libraries take their own memory first
    before = peak_mb()
    run()
    return peak_mb() - before


def peak_mb() -> float:
    """Of this process since its start (Linux; getrusage would count the parent's, too)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def triplet_sides(size: int, dim: int):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, dim, generator=generator, requires_grad=True)
    labels = torch.arange(size) // SAMPLES_PER_CLASS
    loss = TripletLoss(MARGIN, normalize=False)
    distance = LpDistance(normalize_embeddings=False)
    miner = BatchHardMiner(distance=distance)
    reference = TripletMarginLoss(margin=MARGIN, distance=distance, reducer=MeanReducer())

    def ours() -> float:
        x.grad = None
        value = loss(x, labels)
        value.backward()
        return value.item()

    def theirs() -> float:
        x.grad = None
        value = reference(x, labels, miner(x, labels))
        value.backward()
        return value.item()

    return ours, theirs


def center_sides(size: int, dim: int, num_classes: int):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, dim, generator=generator, requires_grad=True)
    labels = torch.randint(num_classes, (size,), generator=generator)
    loss = CenterLoss(num_classes, dim)
    centers = torch.zeros(num_classes, dim, requires_grad=True)
    optimizer = torch.optim.SGD([centers], 0.5)

    def ours() -> float:
        x.grad = None
        value = loss(x, labels)
        value.backward()
        if num_classes > size:
            loss.move(x.detach(), labels)
        else:
            loss.update(loss.sums(x.detach(), labels))
        return value.item()

    def theirs() -> float:
        x.grad = None
        optimizer.zero_grad()
        squared = x.square().sum(1, keepdim=True) + centers.square().sum(1) - 2 * x @ centers.T
        mask = labels[:, None] == torch.arange(num_classes)
        value = (squared * mask).sum() / size / 2
        value.backward()
        optimizer.step()
        return value.item()

    return ours, theirs


if __name__ == "__main__":
    main()
