"""P12: bytes that a q1 step sends between ranks, by formula and as the loopback interface counts them.

    python benchmarks/wire.py [--workers 2] [--batch 512] [--steps 3]

For W ranks, P parameters, batch norms of c channels each, G samples of D embedding values, C classes, 4 bytes each,
a ring sends over all ranks together

    gradients            all-to-all and all-gather of P:           2 (W-1) P, as an all-reduce (DDP's) of P
    in blocks            the same, norms' statistics with them:    2 (W-1) (P + sum_c 2c), W a power of two
    sync batch norm      all-gathers of 2c+1 and of 2c:            sum_c  W (W-1) (4c+1)
    triplets             all-gather and all-reduce of G D:         W (W-1) ceil(G/W) D + 2 (W-1) G D
    centres              all-reduce of C (D+1):                    2 (W-1) C (D+1)

Linux; nothing else may use the loopback meanwhile.
"""

import argparse
from math import ceil
from pathlib import Path

import torch
from torch import nn

from dlops_dist.data.loader import Batch
from dlops_dist.distributed.ranks import run_ranks
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.samples import Inputs
from dlops_dist.recipes.q1 import Settings as Q1

CLASSES = 200
VARIANTS = {
    "gradients": {"model": {"norm": "local"}},
    "in blocks": {},
    "sync batch norm": {"model": {"norm": "sync"}},
    "triplets": {"model": {"norm": "local"}, "loss": "triplet"},
    "centres": {"model": {"norm": "local"}, "loss": "center"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    expected = formulas(arguments.workers, arguments.batch)
    baseline = 0.0
    for name, changes in VARIANTS.items():
        counted = run_ranks(count, arguments.workers, changes, arguments.batch, arguments.steps, timeout_s=300)[0]
        baseline = baseline or counted
        extra = counted if name == "gradients" else counted - baseline
        print(
            f"{name:16} formula {expected[name] / 1e6:8.3f} MB, counted {extra / 1e6:8.3f} MB a step; "
            f"{100 * expected[name] / expected['gradients']:.2f} % and {100 * extra / baseline:.2f} % of the gradients"
        )


def formulas(workers: int, batch: int) -> dict[str, float]:
    """Bytes over all ranks for one step."""
    model = learner_of({}, batch).model
    channels = [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    dim, reduce, gather = model.embedding_dim, 2 * (workers - 1), workers * (workers - 1)
    return {
        "gradients": 4 * reduce * sum(p.numel() for p in model.parameters()),
        "in blocks": 4 * reduce * 2 * sum(channels),
        "sync batch norm": 4 * sum(gather * (4 * c + 1) for c in channels),
        "triplets": 4 * (gather * ceil(batch / workers) * dim + reduce * batch * dim),
        "centres": 4 * reduce * CLASSES * (dim + 1),
    }


def learner_of(changes: dict, batch: int) -> Learner:
    settings = Q1(
        global_batch_size=batch, augment={"crop_padding": 0, "flip": False},
        **{**changes, "model": {"stem": "imagenet", **changes.get("model", {})}},
    )  # fmt: skip
    return Learner(settings, Inputs(CLASSES, (0.5,) * 3, (0.25,) * 3), 100, torch.device("cpu"))


def count(changes: dict, batch: int, steps: int) -> float:
    """Bytes on the loopback for each step, after one that is not counted."""
    learner = learner_of(changes, batch)
    part = learner.blocks.share(batch)
    labels = torch.arange(batch) % CLASSES
    images = torch.randint(256, (part.stop - part.start, 32, 32, 3), dtype=torch.uint8)
    own = Batch(images, torch.arange(batch)[part], labels, part, labels.numpy())
    learner.step([own], 0, 0)
    torch.distributed.barrier()
    before = loopback_bytes()
    for step in range(steps):
        learner.step([own], 0, step)
    torch.distributed.barrier()
    return (loopback_bytes() - before) / steps


def loopback_bytes() -> int:
    line = next(x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


if __name__ == "__main__":
    main()
