"""All that a recipe may bring, at once: an optimiser with groups, an order, a transform, a metric, dropout."""

import numpy as np
import torch
from torch import nn
from torchvision.transforms import v2

from dlops_dist import CrossEntropyLoss, Embedder, Recipe, Run


class Settings(Run):
    width: int = 6


def certainty(judged):
    return judged.logits.softmax(dim=1).amax(dim=1)


def adamw(named):
    head = [p for name, p in named if name.startswith("fc.")]
    others = [p for name, p in named if not name.startswith("fc.")]
    return torch.optim.AdamW([{"params": others}, {"params": head, "lr": 0.002}], 0.001)


def recipe(settings, inputs):
    width, size = settings.width, settings.global_batch_size
    trunk = nn.Sequential(
        nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    )  # fmt: skip

    def batches(seed, epoch, labels):
        order = np.random.default_rng((seed, epoch)).permutation(len(labels))
        return order[: len(order) // size * size].reshape(-1, size)

    return Recipe(
        Embedder(trunk, 4 * width, inputs.num_classes, inputs.image_size),
        {"ce": (1.0, CrossEntropyLoss())},
        optimizer=adamw,
        batches=batches,
        augment=v2.RandAugment(),
        metrics={"certainty": certainty},
    )
