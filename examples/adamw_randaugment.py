"""AdamW, two groups of weights, and RandAugment (Cubuk et al. 2020) of torchvision, run for each sample under its key.

python -m dlops_dist.train examples/adamw_randaugment.py --local --data.shards shards/shapes
"""

import torch
from pydantic import Field
from torch import nn
from torchvision.models import resnet18
from torchvision.transforms import v2

import dlops_dist
from dlops_dist import CrossEntropyLoss, Embedder, Recipe


class Settings(dlops_dist.Run):
    """ResNet-18 of torchvision by AdamW, on images that RandAugment changes."""

    num_ops: int = Field(2, ge=0)
    """Changes of an image, one after the other."""
    magnitude: int = Field(9, ge=0, le=30)
    """Of the changes."""
    head_lr: float = Field(1e-2, gt=0)
    """Peak learning rate of the head."""
    optimizer: dlops_dist.Optimizer = dlops_dist.Optimizer(lr=1e-3, weight_decay=0.05)


def recipe(settings: Settings, inputs) -> Recipe:
    trunk = resnet18()
    trunk.fc = nn.Identity()

    def adamw(named):
        head = [p for name, p in named if name.startswith("fc.")]
        others = [p for name, p in named if not name.startswith("fc.")]
        groups = [{"params": others}, {"params": head, "lr": settings.head_lr}]
        return torch.optim.AdamW(groups, settings.optimizer.lr, weight_decay=settings.optimizer.weight_decay)

    return Recipe(
        Embedder(trunk, 512, inputs.num_classes, inputs.image_size),
        {"ce": (1.0, CrossEntropyLoss())},
        optimizer=adamw,
        augment=v2.RandAugment(settings.num_ops, settings.magnitude),
    )
