"""Draws docs/promise.png for the README from runs that it makes: `python docs/promise.py`, two minutes on two cores.

The training loss of each step on 1 to 4 workers under torchrun, ours and that of a loop with torch's DDP: the same
network (q1's ResNet-18, narrow), generated images, batch size, optimiser and learning rate.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from dlops_dist.data.pack import pack
from dlops_dist.data.shapes import write_tiny_imagenet
from dlops_dist.data.shards import Split, read_manifest
from dlops_dist.data.sources import TinyImageNet
from dlops_dist.models.resnet import resnet18

WORKERS, BATCH, EPOCHS, WIDTH, LR = (1, 2, 3, 4), 40, 6, 16, 0.01
OURS = f"""q1 --loss ce --epochs {EPOCHS} --global-batch-size {BATCH} --blocks 4 --log-every 1
    --model.stem imagenet --model.width {WIDTH} --augment.crop-padding 0 --augment.no-flip
    --optimizer.lr {LR} --optimizer.weight-decay 0 --optimizer.schedule constant --optimizer.warmup-epochs 0""".split()
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")


def main() -> None:
    if "RANK" in os.environ:  # this process is one of torchrun's
        under_ddp(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tiny_imagenet(folder / "shapes.zip", train_per_class=40, test_per_class=10)
        pack(TinyImageNet(folder / "shapes.zip"), folder / "shards", "shapes", workers=1)
        sides = {
            "dlops_dist: the same bits": [ours(folder, number) for number in WORKERS],
            "DistributedDataParallel": [
                json.loads(torchrun(number, __file__, folder / "shards")) for number in WORKERS
            ],
        }
    draw(sides, Path(__file__).with_suffix(".png"))


def torchrun(number: int, *command: object) -> str:
    """What a command prints."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *map(str, command)], stdout=subprocess.PIPE, text=True, check=True, env=environment
    ).stdout


def ours(folder: Path, number: int) -> list[float]:
    where = ["--name", number, "--runs-dir", folder, "--data.shards", folder / "shards", "--data.cache-dir", folder]
    torchrun(number, "-m", "dlops_dist.train", *OURS, *where)
    return [json.loads(line)["loss"] for line in (folder / f"{number}/steps.jsonl").read_text().splitlines()]


def under_ddp(shards: Path) -> None:
    """Print the losses of all steps, each over all ranks' samples, on rank 0."""
    torch.distributed.init_process_group("gloo")
    rank, number = torch.distributed.get_rank(), torch.distributed.get_world_size()
    manifest = read_manifest(shards)
    split, mean, std = Split(shards, manifest, "train"), torch.tensor(manifest.mean), torch.tensor(manifest.std)
    torch.manual_seed(0)
    network = DistributedDataParallel(resnet18(len(manifest.classes), "imagenet", WIDTH))
    optimizer = torch.optim.SGD(network.parameters(), LR, momentum=0.9)
    losses = []
    for epoch in range(EPOCHS):
        order = np.random.default_rng(epoch).permutation(len(split))
        for batch in order[: len(order) // BATCH * BATCH].reshape(-1, BATCH):
            own = np.array_split(batch, number)[rank]
            images = ((torch.from_numpy(split.read(own)) / 255 - mean) / std).permute(0, 3, 1, 2)
            loss = F.cross_entropy(network(images), torch.from_numpy(split.labels[own]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total = loss.detach() * len(own)
            torch.distributed.all_reduce(total)
            losses.append(total.item() / BATCH)
    if rank == 0:
        print(json.dumps(losses))
    torch.distributed.destroy_process_group()


def draw(sides: dict[str, list[list[float]]], path: Path) -> None:
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, (title, runs) in zip(figure.subplots(1, 2, sharey=True), sides.items(), strict=True):
        is_one = all(run == runs[0] for run in runs)  # drawn over each other, each thinner than the one below
        for place, (number, losses) in enumerate(zip(WORKERS, runs, strict=True)):
            width = 10.0 - 2.6 * place if is_one else 1.6
            label = f"{number} worker{'s' * (number > 1)}"
            axes.plot(range(1, len(losses) + 1), losses, color=COLOURS[place], linewidth=width, label=label)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("training loss")
    figure.legend(*figure.axes[1].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
