"""Supervised contrastive learning (Khosla et al. 2020, eq. 2): two views of each image, positives of the same class.

python -m dlops_dist.train examples/supcon.py --local --data.shards shards/shapes
"""

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

import dlops_dist
from dlops_dist import CrossEntropyLoss, Embedder, Recipe, Terms


class Settings(dlops_dist.Run):
    """ResNet-18 embeddings under the supervised contrastive loss; the head is trained beside it, to be judged."""

    temperature: float = Field(0.1, gt=0)
    """Of the similarities."""
    augment: dlops_dist.Augment = dlops_dist.Augment(resized_crop=0.6, brightness=0.4, contrast=0.4, saturation=0.4)
    optimizer: dlops_dist.Optimizer = dlops_dist.Optimizer(lr=3e-4, weight_decay=1e-4)


class SupCon(nn.Module):
    """l_i = -1/|P_i| sum_{p in P_i} log exp(x_i x_p / t) / sum_{a != i} exp(x_i x_a / t), P_i its class but i."""

    reads, sees = "embeddings", "all"

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def terms(self, x: Tensor, labels: Tensor, anchors: slice) -> Terms:
        x = F.normalize(x)
        others = torch.arange(len(x), device=x.device) != torch.arange(len(x), device=x.device)[anchors, None]
        logits = (x[anchors] @ x.T / self.temperature).masked_fill(~others, -torch.inf)
        positive = (labels[anchors, None] == labels) & others
        likelihood = logits.log_softmax(dim=1).masked_fill(~positive, 0).sum(dim=1)
        return Terms(-(likelihood / positive.sum(dim=1).clamp(min=1)).sum(), len(likelihood))


def recipe(settings: Settings, inputs) -> Recipe:
    trunk = resnet18()
    trunk.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128, bias=False), nn.BatchNorm1d(128))
    return Recipe(
        Embedder(trunk, 128, inputs.num_classes, inputs.image_size),
        {"ce": (0.0, CrossEntropyLoss()), "supcon": (1.0, SupCon(settings.temperature))},
        optimizer=lambda named: torch.optim.AdamW(
            [p for _, p in named], settings.optimizer.lr, weight_decay=settings.optimizer.weight_decay
        ),
        balanced=True,
        views=2,
        directions=True,
    )
