"""P5 and P7: one q1 training step against a bare loop and in blocks, and the optimiser alone. Images in memory.

    python benchmarks/step.py [--stem imagenet] [--batch 64] [--steps 4] [--runs 7]

Ours counts everything that a step of a run does: crop, flip and normalise on uint8 images, the loss, the schedule and
the metrics. The bare loop is torchvision's resnet18, torch's cross-entropy and SGD on images that are normalised
already. As in training, the process keeps the memory that it frees, for both.
"""

import argparse

import torch
import torchvision
from timing import alternate, medians
from torch.nn import functional as F

from dlops_dist.data.loader import Batch
from dlops_dist.data.memory import keep_freed_memory
from dlops_dist.engine.exactness import use_threads
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.samples import Inputs
from dlops_dist.optim import SGD
from dlops_dist.recipes.q1 import Settings as Q1

THREADS = torch.get_num_threads()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stem", choices=["imagenet", "cifar"], default="imagenet")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4, help="in each timed run")
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    keep_freed_memory()

    sides = {
        "whole": our_steps(arguments, "sync"),
        "in blocks": our_steps(arguments, "block"),
        "bare": bare_steps(arguments),
    }
    found, images = medians(sides, arguments.runs), arguments.batch * arguments.steps
    rates = {name: images / seconds for name, seconds in found.items()}
    print(f"threads {THREADS}, stem {arguments.stem}, batch {arguments.batch}")
    ratio, cost = rates["whole"] / rates["bare"], found["in blocks"] / found["whole"]
    print(f"P5 step: ours {rates['whole']:.1f} images/s, bare loop {rates['bare']:.1f}, ratio {ratio:.3f}")
    print(f"in blocks: {rates['in blocks']:.1f} images/s, {cost:.3f} x the time of the whole batch")

    ours_s, torch_s = alternate(*optimizers(), runs=25)
    print(
        f"P7 SGD step: ours {1e3 * ours_s:.2f} ms, torch foreach {1e3 * torch_s:.2f} ms, ratio {ours_s / torch_s:.3f}"
    )


def our_steps(arguments: argparse.Namespace, norm: str):
    """Batch norm over the whole batch, computed at once by all threads; or over blocks, one thread for each."""
    settings = Q1(model={"stem": arguments.stem, "norm": norm}, global_batch_size=arguments.batch)
    learner = Learner(settings, Inputs(200, (0.48, 0.45, 0.4), (0.28, 0.27, 0.28)), 1000, torch.device("cpu"))
    ids, labels = torch.arange(arguments.batch), torch.randint(200, (arguments.batch,))
    images = torch.randint(256, (arguments.batch, 64, 64, 3), dtype=torch.uint8)
    batch = Batch(images, ids, labels, slice(0, arguments.batch), labels.numpy())

    def run() -> None:
        use_threads(settings, learner.plan, learner.device)
        for step in range(arguments.steps):
            learner.step([batch], 0, step).item()
        torch.set_num_threads(THREADS)

    return run


def bare_steps(arguments: argparse.Namespace):
    model = torchvision.models.resnet18(num_classes=200).to(memory_format=torch.channels_last)
    if arguments.stem == "cifar":
        model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = torch.nn.Identity()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    images = torch.randn(arguments.batch, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(200, (arguments.batch,))
    model.train()

    def run() -> None:
        for _ in range(arguments.steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            loss.item()

    return run


def optimizers():
    """One step of each on ResNet-18's parameters."""
    steps = []
    for kind, options in ((SGD, {}), (torch.optim.SGD, {"foreach": True})):
        model = torchvision.models.resnet18(num_classes=200)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        steps.append(kind(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, **options).step)
    return steps


if __name__ == "__main__":
    main()
