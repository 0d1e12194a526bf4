"""ArcFace (Deng et al. 2019, eq. 3): a loss with weights of its own, written for any number of workers.

python -m dlops_dist.train examples/arcface.py --local --data.shards shards/shapes
"""

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

import dlops_dist
from dlops_dist import CrossEntropyLoss, Embedder, Recipe, Terms


class Loss(dlops_dist.Section):
    """ArcFace."""

    margin: float = Field(0.3, ge=0, lt=1.5)
    """Added to the angle between a sample and its class, in radians."""
    scale: float = Field(16.0, gt=0)
    """Of the cosines."""


class Settings(dlops_dist.Run):
    """ResNet-18 embeddings under ArcFace; the head is trained beside it, to be judged."""

    loss: Loss = Loss()
    optimizer: dlops_dist.Optimizer = dlops_dist.Optimizer(lr=0.02)


class ArcFace(nn.Module):
    """l_i = -log softmax_y(s cos(a_ij + m [j = y])), a_ij the angle between x_i and the weight of class j."""

    reads, sees = "embeddings", "own"

    def __init__(self, num_classes: int, embedding_dim: int, chosen: Loss) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, embedding_dim) * 0.1)
        self.chosen = chosen

    def terms(self, x: Tensor, labels: Tensor) -> Terms:
        cosines = F.linear(F.normalize(x), F.normalize(self.weight.to(x.dtype))).clamp(-1 + 1e-7, 1 - 1e-7)
        moved = (cosines.acos() + self.chosen.margin * F.one_hot(labels, cosines.shape[1])).cos()
        return Terms(F.cross_entropy(self.chosen.scale * moved, labels, reduction="sum"), len(labels))


def recipe(settings: Settings, inputs) -> Recipe:
    trunk = resnet18()
    trunk.fc = nn.Linear(512, 64)
    arcface = ArcFace(inputs.num_classes, 64, settings.loss)
    return Recipe(
        Embedder(trunk, 64, inputs.num_classes, inputs.image_size),
        {"ce": (0.0, CrossEntropyLoss()), "arcface": (1.0, arcface)},
        directions=True,
    )
