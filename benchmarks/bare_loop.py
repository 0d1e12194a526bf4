"""A3: what a bare single-process loop reaches: torchvision's resnet18, torch's loss, SGD and schedule.

    python benchmarks/bare_loop.py SHARDS [--epochs 10] [--batch 64] [--lr 0.05] [--nesterov] [--seed 0]

The same images, augmentation (4-pixel pad and crop, flip), batch size, warm-up and cosine schedule as
`train q1 --loss ce --model.stem imagenet`; everything else is what torch and torchvision bring.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch.nn import functional as F
from torchvision.transforms import v2

from dlops_dist.data.shards import Split, read_manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--nesterov", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    manifest = read_manifest(arguments.shards)
    (images, labels), (test_images, test_labels) = (load(arguments.shards, manifest, s) for s in ("train", "test"))
    augment = v2.Compose([v2.RandomCrop(64, padding=4), v2.RandomHorizontalFlip()])
    normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(manifest.mean, manifest.std)])

    model = torchvision.models.resnet18(num_classes=len(manifest.classes)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), arguments.lr, momentum=0.9, weight_decay=5e-4, nesterov=arguments.nesterov
    )
    steps = len(images) // arguments.batch
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / steps, total_iters=steps)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, (arguments.epochs - 1) * steps)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [steps])
    for epoch in range(arguments.epochs):
        model.train()
        for ids in torch.randperm(len(images))[: steps * arguments.batch].view(steps, -1):
            batch = normalize(torch.stack([augment(image) for image in images[ids]]))
            optimizer.zero_grad()
            F.cross_entropy(model(batch), labels[ids]).backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            logits = torch.cat([model(normalize(part)) for part in test_images.split(256)])
        hits = logits.topk(5).indices == test_labels[:, None]
        top1, top5 = (hits[:, :k].any(dim=1).float().mean() for k in (1, 5))
        print(f"epoch {epoch + 1}/{arguments.epochs}  test top-1 {top1:.2%} top-5 {top5:.2%}", flush=True)


def load(shards: Path, manifest, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All images (N, 3, H, W) uint8 and labels of a split."""
    split = Split(shards, manifest, name)
    images = torch.from_numpy(split.read(np.arange(len(split)))).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(split.labels).long()


if __name__ == "__main__":
    main()
