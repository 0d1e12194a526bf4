"""A training loop as it is written elsewhere, and the same as a recipe: accuracies and images/s of both.

    python benchmarks/outside.py SHARDS [--epochs 5] [--batch 50] [--lr 0.02] [--seed 0]

Elsewhere: one process, a DataLoader over decoded images, torchvision's resnet18 and transforms, Proxy Anchor of
pytorch-metric-learning beside cross-entropy, torch's SGD and schedules. The recipe: examples/proxy_anchor_pml.py. Both
train with the same settings, chosen beforehand, and are judged after the last epoch on test. One seed says little, so
first both make six steps in float64 from equal weights, on equal images: their losses must be the same.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from bare_loop import load
from pytorch_metric_learning.losses import ProxyAnchorLoss
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18
from torchvision.transforms import v2

from dlops_dist.config import load_recipe
from dlops_dist.data.loader import Batch
from dlops_dist.data.memory import keep_freed_memory
from dlops_dist.data.shards import read_manifest
from dlops_dist.distributed.exact import KeyedDropout
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.samples import Inputs

RECIPE = Path(__file__).parents[1] / "examples/proxy_anchor_pml.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"six steps from equal weights: losses differ by {steps_apart():.0e} at most", flush=True)
    for name, side in (("elsewhere", elsewhere), ("the recipe", recipe)):
        top1, recall, rate = side(arguments)
        print(f"{name}: test top-1 {top1:.1%}, Recall@1 {recall:.1%}, {rate:.0f} images/s", flush=True)


class Images(Dataset):
    def __init__(self, images: torch.Tensor, labels: torch.Tensor, transform: nn.Module) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.transform(self.images[index]), self.labels[index]


def networks(num_classes: int, dropout: float) -> tuple[nn.Module, nn.Module, nn.Module]:
    trunk = resnet18()
    trunk.fc = nn.Sequential(nn.Dropout(dropout), nn.Linear(512, 128))
    return trunk, nn.Linear(128, num_classes), ProxyAnchorLoss(num_classes, 128, margin=0.1, alpha=32)


def sgd(trunk: nn.Module, head: nn.Module, proxies: nn.Module, lr: float) -> torch.optim.SGD:
    weights = [*trunk.parameters(), *head.parameters(), *proxies.parameters()]
    return torch.optim.SGD(weights, lr, momentum=0.9, weight_decay=5e-4)


def step(trunk, head, proxies, optimizer, images: torch.Tensor, labels: torch.Tensor) -> float:
    optimizer.zero_grad()
    embeddings = trunk(images)
    loss = F.cross_entropy(head(embeddings), labels) + proxies(embeddings, labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def steps_apart() -> float:
    """The largest difference of six losses of both sides, nothing drawn."""
    settings = load_recipe(str(RECIPE)).settings_type(
        precision="float64", compile=False, blocks=1, augment={"crop_padding": 0, "flip": False},
        optimizer={"lr": 0.02, "schedule": "constant", "warmup_epochs": 0},
    )  # fmt: skip
    learner = Learner(settings, Inputs(10, (0.5,) * 3, (0.25,) * 3, (32, 32)), 6, torch.device("cpu"))
    for module in learner.model.modules():
        if isinstance(module, KeyedDropout):
            module.p = 0.0
    trunk, head, proxies = (network.double() for network in networks(10, dropout=0))
    trunk.load_state_dict(learner.model.trunk.state_dict())
    head.load_state_dict(learner.model.fc.state_dict())
    proxies.load_state_dict(learner.loss["proxy"].function.state_dict())
    optimizer, differences = sgd(trunk, head, proxies, 0.02), []
    ids, labels = torch.arange(20), torch.arange(20) % 10
    for number in range(6):
        pixels = torch.randint(256, (20, 32, 32, 3), dtype=torch.uint8)
        ours = learner.step([Batch(pixels, ids, labels, slice(0, 20), labels.numpy())], 0, number)
        images = ((pixels.double() / 255 - 0.5) / 0.25).permute(0, 3, 1, 2)
        differences.append(abs(ours.item() - step(trunk, head, proxies, optimizer, images, labels)))
    return max(differences)


def elsewhere(arguments: argparse.Namespace) -> tuple[float, float, float]:
    """Top-1, Recall@1 and images/s of the bare loop, which like ours keeps the memory that it frees."""
    keep_freed_memory()
    torch.manual_seed(arguments.seed)
    manifest = read_manifest(arguments.shards)
    num_classes, size = len(manifest.classes), (manifest.height, manifest.width)
    scale = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(manifest.mean, manifest.std)]
    change = v2.Compose([v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip(), *scale])
    train = Images(*load(arguments.shards, manifest, "train"), change)
    test = Images(*load(arguments.shards, manifest, "test"), v2.Compose(scale))
    batches = DataLoader(train, arguments.batch, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True)

    trunk, head, proxies = networks(num_classes, dropout=0.2)
    trunk = trunk.to(memory_format=torch.channels_last)
    optimizer = sgd(trunk, head, proxies, arguments.lr)
    steps = len(batches)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / steps, total_iters=steps)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, (arguments.epochs - 1) * steps)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [steps])

    started = time.monotonic()
    trunk.train()
    for _ in range(arguments.epochs):
        for images, labels in batches:
            step(trunk, head, proxies, optimizer, images, labels)
            schedule.step()
    rate = arguments.epochs * steps * arguments.batch / (time.monotonic() - started)

    trunk.eval()
    with torch.no_grad():
        embeddings = torch.cat([trunk(images) for images, _ in DataLoader(test, 250)])
        top1 = (head(embeddings).argmax(dim=1) == test.labels).float().mean()
        similarities = F.normalize(embeddings) @ F.normalize(embeddings).T
    nearest = similarities.fill_diagonal_(-torch.inf).argmax(dim=1)
    return float(top1), float((test.labels[nearest] == test.labels).float().mean()), rate


def recipe(arguments: argparse.Namespace) -> tuple[float, float, float]:
    """The same figures of a run of the recipe."""
    with tempfile.TemporaryDirectory() as runs:
        command = [
            sys.executable, "-m", "dlops_dist.train", str(RECIPE), "--local", "--runs-dir", runs, "--name", "run",
            "--data.shards", str(arguments.shards), "--epochs", str(arguments.epochs), "--seed", str(arguments.seed),
            "--global-batch-size", str(arguments.batch), "--optimizer.lr", str(arguments.lr),
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (Path(runs) / "run/metrics.jsonl").read_text().splitlines()]
    rate = len(rows) / sum(1 / row["train_images_per_s"] for row in rows)
    return rows[-1]["test/top1"], rows[-1]["test/recall_at_1"], rate


if __name__ == "__main__":
    main()
