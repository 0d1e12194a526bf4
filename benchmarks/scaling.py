"""What a step costs on many GPUs: its exchanges, bytes and time, computed from parts that were measured on one.

    python benchmarks/scaling.py [--images 64] [--gpus 8 64 1024] [--classes 1000] [--compute-ms 14.7] [--gb-per-s 40]

Each GPU has so many images of a step, one block of its own. What a step computes was measured (docs/gpu.md: 128 images
of 64x64, ResNet-18, one H100, where the host's launches are what takes the time). What the links carry, and how long a
message takes, are assumptions: --gb-per-s of each GPU, --message-us. Nothing overlaps here; gradients do in truth.
"""

import argparse
from math import ceil, log2

import wire
from torch import nn

from dlops_dist.engine.epoch_sums import LARGEST
from dlops_dist.engine.gradients import BUCKET

PASSES = 24
"""Over all embeddings of a batch that mining makes on each rank, at --memory-gb-per-s."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--compute-ms", type=float, default=14.7)
    parser.add_argument("--gb-per-s", type=float, default=40.0)
    parser.add_argument("--message-us", type=float, default=2.0)
    parser.add_argument("--memory-gb-per-s", type=float, default=2000.0)
    parser.add_argument("--tflops", type=float, default=40.0, help="of float32 products")
    chosen = parser.parse_args()
    print("gpus  loss            exchanges  MB sent  messages  compute ms  bytes ms  messages ms  share of compute")
    for gpus in chosen.gpus:
        for loss, cost in costs(gpus, chosen).items():
            exchanges, sent, messages, compute = cost
            carried, begun = sent / chosen.gb_per_s / 1e6, messages * chosen.message_us / 1e3
            share = chosen.compute_ms / (compute + carried + begun)
            print(
                f"{gpus:4}  {loss:14}  {exchanges:9}  {sent / 1e6:7.1f}  {messages:8,}  {compute:10.1f}  "
                f"{carried:8.1f}  {begun:11.1f}  {share:16.0%}"
            )
    for gpus in chosen.gpus:
        print(f"{gpus:4} gpus: {beside(gpus, chosen)}")


def costs(gpus: int, chosen: argparse.Namespace) -> dict[str, tuple[int, float, int, float]]:
    """{loss: (exchanges, bytes that a GPU sends, messages that it sends, ms that it computes)} of a step."""
    parameters, dim, channels = resnet18()
    batch, others = gpus * chosen.images, (gpus - 1) / gpus
    gradients = 2 * others * 4 * (parameters + 2 * sum(channels))
    buckets = ceil(4 * parameters / BUCKET)
    to_all, ring = gpus - 1, gpus - 1
    few = 1 + 2 * buckets, gradients, buckets * (to_all + ring) + ceil(log2(gpus)), chosen.compute_ms
    by_sums = chosen.classes <= batch
    center = few[0] + (not by_sums), gradients + others * 4 * (
        2 * chosen.classes * (dim + 1) if by_sums else batch * dim
    ), few[2] + (0 if by_sums else ring), few[3]  # fmt: skip
    mining = PASSES * 4 * batch * dim / chosen.memory_gb_per_s / 1e6
    mining += 2 * batch * chosen.images * dim / chosen.tflops / 1e9
    triplet = few[0] + 2, gradients + 2 * others * 4 * batch * dim, few[2] + to_all + ring, few[3] + mining
    norms = sum(wire.sync_norm_values(gpus, c) for c in channels) * 4 / gpus
    calls = len(channels) * (2 if gpus <= wire.GATHERED else 3)
    sync = few[0] + calls, gradients + norms, few[2] + calls * 2 * ceil(log2(gpus)), few[3]
    return {"ce": few, "center": center, "triplet": triplet, "ce, sync norm": sync}


def beside(gpus: int, chosen: argparse.Namespace) -> str:
    """What is held or sent beside the steps."""
    _, dim, _ = resnet18()
    sums = gpus * chosen.classes * (dim + 1) * 4
    kept = f"{sums / 1e6:,.0f} MB of {gpus} blocks" if sums <= LARGEST else f"{sums / gpus / 1e6:,.0f} MB, once"
    return f"sums of classes in a checkpoint {kept}; a resume reads it once, as one broadcast"


def norm_share(ranks: int) -> float:
    """Bytes of norms over all ranks, as a part of the gradients'."""
    parameters, _, channels = resnet18()
    return sum(wire.sync_norm_values(ranks, c) for c in channels) / (2 * (ranks - 1) * parameters)


def resnet18() -> tuple[int, int, list[int]]:
    """Parameters, embedding values, channels of each norm."""
    model = wire.learner_of({}, 64).model
    channels = [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    return sum(p.numel() for p in model.parameters()), model.embedding_dim, channels


if __name__ == "__main__":
    main()
