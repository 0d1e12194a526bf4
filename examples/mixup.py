"""Mixup and cutmix: each image with the next one of the batch, and the labels of both.

python -m dlops_dist.train examples/mixup.py --local --data.shards shards/shapes --augment.mixup 0.4
"""

from torch import nn
from torchvision.models import resnet18

import dlops_dist
from dlops_dist import CrossEntropyLoss, Embedder, Recipe


class Settings(dlops_dist.Run):
    """ResNet-18 of torchvision on mixed images."""

    augment: dlops_dist.Augment = dlops_dist.Augment(mixup=0.2, cutmix=1.0)
    optimizer: dlops_dist.Optimizer = dlops_dist.Optimizer(lr=0.02)


def recipe(settings: Settings, inputs) -> Recipe:
    trunk = resnet18()
    trunk.fc = nn.Identity()
    return Recipe(Embedder(trunk, 512, inputs.num_classes, inputs.image_size), {"ce": (1.0, CrossEntropyLoss())})
