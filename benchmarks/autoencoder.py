"""q2: images/s of each phase against a bare torch loop. Data in memory, one process.

    python benchmarks/autoencoder.py [--batch 128] [--steps 2] [--runs 7] [--only "layer 1"]

Ours counts everything that a step of a run does: crop, flip and normalise on uint8 images (where a phase sees pixels),
the loss, the schedule and the metrics. The bare loop has torch's own modules, loss and SGD (momentum and weight decay
of the phase), without augmentation and metrics. It too starts from uint8 (105,000 images of STL-10 would fill 11.6 GB
as floats), or from codes. As in training, the process keeps the memory that it frees, for both.
"""

import argparse
from collections.abc import Callable
from itertools import pairwise

import torch
from timing import alternate
from torch import nn
from torch.nn import functional as F

from dlops_dist.data.loader import Batch
from dlops_dist.data.memory import keep_freed_memory
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.samples import Inputs
from dlops_dist.recipes.q2 import Settings as Q2
from dlops_dist.recipes.stacked.codes import Codes
from dlops_dist.recipes.stacked.reconstruction import ReconstructionLearner
from dlops_dist.recipes.stacked.stages import build_stack, classifier

CPU = torch.device("cpu")
SIZE, CODE = 96, 128
INPUTS = Inputs(10, (0.45, 0.44, 0.4), (0.26, 0.26, 0.27), (SIZE, SIZE))
PHASES = ("layer 1", "layer 2", "layer 3", "layer 4", "layer 5", "layer 6", "joint", "frozen", "finetuned")
STEPS_PER_EPOCH = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2, help="in each timed run; layers on codes take fifty times more")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--only", choices=PHASES, action="append")
    arguments = parser.parse_args()
    keep_freed_memory()
    print(f"threads {torch.get_num_threads()}, batch {arguments.batch}")
    pretraining = []
    for phase in arguments.only or PHASES:
        on_codes = phase.startswith("layer") and phase != "layer 1"
        steps = arguments.steps * (50 if on_codes else 1)
        ours, bare = ours_of(phase, arguments.batch, steps), bare_of(phase, arguments.batch, steps)
        ours_s, bare_s = alternate(ours, bare, arguments.runs)
        tell(phase, arguments.batch * steps, ours_s, bare_s)
        if phase.startswith("layer"):
            pretraining.append((ours_s / steps, bare_s / steps))
    if len(pretraining) > 1:
        ours_s, bare_s = map(sum, zip(*pretraining, strict=True))
        tell(f"these {len(pretraining)} layers, one after the other", arguments.batch, ours_s, bare_s)


def tell(phase: str, images: int, ours_s: float, bare_s: float) -> None:
    rates = f"ours {images / ours_s:,.0f} images/s, bare loop {images / bare_s:,.0f}"
    print(f"{phase}: {rates}, ratio {bare_s / ours_s:.3f}", flush=True)


def ours_of(phase: str, batch_size: int, steps: int) -> Callable[[], None]:
    settings = Q2(global_batch_size=batch_size, finetune=phase == "finetuned")
    stack = build_stack(settings, INPUTS)
    if phase in ("frozen", "finetuned"):
        learner = Learner(settings, INPUTS, STEPS_PER_EPOCH, CPU, classifier(settings, INPUTS, stack))
    else:
        layer = None if phase == "joint" else int(phase[-1]) - 1
        codes = Codes(settings, INPUTS, stack, {}, CPU, print)
        learner = ReconstructionLearner(settings, INPUTS, stack, codes, layer, STEPS_PER_EPOCH, CPU)
    ids, labels = torch.arange(batch_size), torch.randint(10, (batch_size,))
    batch = Batch(data_of(phase, batch_size), ids, labels, slice(0, batch_size), labels.numpy())

    def run() -> None:
        for step in range(steps):
            learner.step([batch], 0, step).item()

    return run


def bare_of(phase: str, batch_size: int, steps: int) -> Callable[[], None]:
    widths = [3 * SIZE * SIZE, *Q2().model.layers]
    pairs = list(pairwise(widths))
    labels = torch.randint(10, (batch_size,))
    data = data_of(phase, batch_size)
    mean, std = (torch.tensor(v).view(1, 1, 1, 3) for v in (INPUTS.mean, INPUTS.std))
    classified = phase in ("frozen", "finetuned")
    if classified:
        used = pairs[: widths.index(CODE)]
        encoder = nn.Sequential(*(m for below, above in used for m in (nn.Linear(below, above), nn.ReLU())))
        encoder.requires_grad_(phase == "finetuned")
        head = nn.Sequential(nn.BatchNorm1d(CODE), nn.Linear(CODE, 10))
        model = nn.Sequential(encoder, head)
    else:
        chosen = pairs if phase == "joint" else pairs[int(phase[-1]) - 1 : int(phase[-1])]
        up = [m for below, above in chosen for m in (nn.Linear(below, above), nn.ReLU())]
        down = [m for below, above in reversed(chosen) for m in (nn.Linear(above, below), nn.ReLU())]
        model = nn.Sequential(*up, *down[:-1])
    chosen_sgd = Q2().optimizer if classified else Q2().pretrain.optimizer
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        1e-6, momentum=chosen_sgd.momentum, weight_decay=chosen_sgd.weight_decay,
    )  # fmt: skip

    def run() -> None:
        for _ in range(steps):
            x = data
            if data.dtype == torch.uint8:
                x = data.float().div_(255).sub_(mean).div_(std).flatten(1)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), labels) if classified else F.mse_loss(model(x), x)
            loss.backward()
            optimizer.step()
            loss.item()

    return run


def data_of(phase: str, batch_size: int) -> torch.Tensor:
    """A batch as it is read: images, or codes."""
    if phase.startswith("layer") and phase != "layer 1":
        return torch.rand(batch_size, Q2().model.layers[int(phase[-1]) - 2])
    return torch.randint(256, (batch_size, SIZE, SIZE, 3), dtype=torch.uint8)


if __name__ == "__main__":
    main()
