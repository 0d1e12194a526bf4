"""P12: what a q1 step sends between ranks: its exchanges and their bytes, by formula and counted in each process.

    python benchmarks/wire.py [--workers 2 4 8] [--batch 128]

For W ranks, P parameters, batch norms of c channels each, G samples of D embedding values, C classes, 4 bytes each, all
ranks together send

    gradients            all-to-all and all-gather of P:                2 (W-1) P, as an all-reduce (DDP's) of P
    in blocks            the same, norms' statistics with them:         2 (W-1) (P + sum_c 2c), W a power of two
    sync batch norm      all-gathers of 2c+1 and of 2c, up to 8 ranks:  sum_c  W (W-1) (4c+1)
                         all-reduces of 2c+1 values of 8 bytes and
                         of 2c of 4, of more:                           sum_c  2 (W-1) (6c+2)
    triplets             all-gather of G D, and of its gradient each
                         rank's own rows:                               W (W-1) ceil(G/W) D + (W-1) G D
    centres              C (D+1) with the gradients:                    2 (W-1) C (D+1)

Counted are the tensors that a process gives to torch; an all-reduce is taken for a ring's.
"""

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from math import ceil
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from dlops_dist.data.loader import Batch
from dlops_dist.distributed.collectives import rank, world_size
from dlops_dist.distributed.norm import GATHERED
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
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--batch", type=int, default=128)
    arguments = parser.parse_args()
    for workers in arguments.workers:
        expected, baseline = formulas(workers, arguments.batch), 0.0
        for name, changes in VARIANTS.items():
            of_ranks = run_ranks(sent_in_a_step, workers, changes, arguments.batch, timeout_s=300)
            counted = sum(size for of_rank in of_ranks for _, size in of_rank)
            baseline = baseline or counted
            extra = counted if name == "gradients" else counted - baseline
            print(
                f"{workers} ranks, {name:16} {len(of_ranks[0]):3} exchanges; formula {expected[name] / 1e6:8.3f} MB, "
                f"counted {extra / 1e6:8.3f} MB a step; {100 * expected[name] / expected['gradients']:.2f} % and "
                f"{100 * extra / baseline:.2f} % of the gradients", flush=True,
            )  # fmt: skip


def formulas(workers: int, batch: int) -> dict[str, float]:
    """Bytes over all ranks for one step."""
    model = learner_of({}, batch).model
    channels = [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    dim, reduce, gather = model.embedding_dim, 2 * (workers - 1), workers * (workers - 1)
    return {
        "gradients": 4 * reduce * sum(p.numel() for p in model.parameters()),
        "in blocks": 4 * reduce * 2 * sum(channels),
        "sync batch norm": 4 * sum(sync_norm_values(workers, c) for c in channels),
        "triplets": 4 * (gather * ceil(batch / workers) * dim + (workers - 1) * batch * dim),
        "centres": 4 * reduce * CLASSES * (dim + 1),
    }


def sync_norm_values(workers: int, channels: int) -> int:
    """Of 4 bytes, over all ranks, that a norm over all ranks sends."""
    if workers <= GATHERED:
        return workers * (workers - 1) * (4 * channels + 1)
    return 2 * (workers - 1) * (2 * (2 * channels + 1) + 2 * channels)


def learner_of(changes: dict, batch: int) -> Learner:
    settings = Q1(
        global_batch_size=batch, augment={"crop_padding": 0, "flip": False},
        **{"blocks": 8, **changes, "model": {"stem": "imagenet", **changes.get("model", {})}},
    )  # fmt: skip
    return Learner(settings, Inputs(CLASSES, (0.5,) * 3, (0.25,) * 3), 100, torch.device("cpu"))


def sent_in_a_step(changes: dict, batch: int, micro_batches: int = 1) -> list[tuple[str, int]]:
    """(exchange, bytes that this rank sends) of the second step."""
    learner, size = learner_of(changes, batch), batch // micro_batches
    own = []
    for first in range(0, batch, size):
        part, labels = learner.blocks.share(size), (first + torch.arange(size)) % CLASSES // 2
        images = torch.randint(256, (part.stop - part.start, 32, 32, 3), dtype=torch.uint8)
        own.append(Batch(images, first + torch.arange(size)[part], labels, part, labels.numpy()))
    learner.step(own, 0, 0)
    with counted() as found:
        learner.step(own, 0, 1)
    return found


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """(name, bytes that this rank sends) of each exchange within it."""
    found: list[tuple[str, int]] = []

    def watched(name, sent, call, *arguments, **options):
        found.append((name, int(sent(*arguments))))
        return call(*arguments, **options)

    with ExitStack() as stack:
        for name, sent in SENT.items():
            stack.enter_context(mock.patch.object(dist, name, partial(watched, name, sent, getattr(dist, name))))
        yield found


def size_of(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


SENT = {
    "all_reduce": lambda x, *_: 2 * (world_size() - 1) * size_of(x) / world_size(),
    "all_gather_into_tensor": lambda whole, own, *_: (world_size() - 1) * size_of(own),
    "all_to_all_single": lambda got, sent, _, parts, *__: size_of(sent) - parts[rank()] * sent.element_size(),
    "broadcast": lambda x, *_: size_of(x),
    "all_gather_object": lambda *_: 0,
    "broadcast_object_list": lambda *_: 0,
}


if __name__ == "__main__":
    main()
