"""What saving costs training: images/s with a checkpoint every few steps, against none; how long a step is held up.

    python benchmarks/checkpoints.py [--every 10] [--steps 30] [--runs 5] [--url URL]

ResNet-18, 7x7 stem, 64x64 images in memory, 32 in a step; every checkpoint holds weights and momenta, 90 MB. Both
sides in turn. Beside them, the same state written while the step waits.
"""

import argparse
import tempfile
import time

import numpy as np
import torch
from timing import medians

from dlops_dist.data.loader import Batch
from dlops_dist.engine.checkpoints import Checkpoints
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.samples import Inputs
from dlops_dist.files import Folder
from dlops_dist.recipes.q1 import Settings as Q1

BATCH = 32
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--steps", type=int, default=30, help="in each run")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--url", help="where to write; by default a temporary folder")
    arguments = parser.parse_args()
    settings = Q1(model={"stem": "imagenet"}, optimizer={"lr": 0.01}, global_batch_size=BATCH)
    learner = Learner(settings, Inputs(20, (0.5,) * 3, (0.25,) * 3), 1000, CPU)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (BATCH, 64, 64, 3), dtype=np.uint8))
    labels = torch.arange(BATCH) % 20
    batch = Batch(images, torch.arange(BATCH), labels, slice(0, BATCH), labels.numpy())
    held: dict[str, list[float]] = {"ours": [], "waiting": []}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoints = Checkpoints(Folder(arguments.url or scratch), 2)

        def train(save: str | None) -> None:
            for step in range(arguments.steps):
                learner.step([batch], 0, step)
                if save and (step + 1) % arguments.every == 0:
                    started = time.perf_counter()
                    checkpoints.save(step, learner.state_dict())
                    if save == "waiting":
                        checkpoints.wait()
                    held[save].append(time.perf_counter() - started)
            checkpoints.wait()

        sides = {"no checkpoints": lambda: train(None)} | {name: lambda name=name: train(name) for name in held}
        seconds = medians(sides, arguments.runs)
    for name, taken in seconds.items():
        rate = f"{arguments.steps * BATCH / taken:6.1f} images/s, {seconds['no checkpoints'] / taken:.3f} x"
        stall = f", a step is held up {1e3 * float(np.median(held[name])):.0f} ms" if name in held else ""
        print(f"{name:15} {rate}{stall}")


if __name__ == "__main__":
    main()
