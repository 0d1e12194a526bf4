"""torchvision's ResNet-18 under a loss of pytorch-metric-learning: Proxy Anchor (Kim et al. 2020), one proxy a class.

python -m dlops_dist.train examples/proxy_anchor_pml.py --local --data.shards shards/shapes
"""

from pydantic import Field
from pytorch_metric_learning.losses import ProxyAnchorLoss
from torch import nn
from torchvision.models import resnet18

import dlops_dist
from dlops_dist import CrossEntropyLoss, Embedder, Recipe, Whole


class Loss(dlops_dist.Section):
    """Proxy Anchor."""

    margin: float = Field(0.1, ge=0)
    """How much nearer a sample must be to its own proxy than to others."""
    alpha: float = Field(32.0, gt=0)
    """Sharpness of its soft maximum."""


class Settings(dlops_dist.Run):
    """ResNet-18 embeddings under Proxy Anchor, beside cross-entropy."""

    loss: Loss = Loss()
    optimizer: dlops_dist.Optimizer = dlops_dist.Optimizer(lr=0.02)


def recipe(settings: Settings, inputs) -> Recipe:
    trunk = resnet18()
    trunk.fc = nn.Sequential(nn.Dropout(0.2), nn.Linear(512, 128))
    proxies = ProxyAnchorLoss(inputs.num_classes, 128, settings.loss.margin, settings.loss.alpha)
    return Recipe(
        model=Embedder(trunk, 128, inputs.num_classes, inputs.image_size),
        losses={"ce": (1.0, CrossEntropyLoss()), "proxy": (1.0, Whole(proxies))},
        directions=True,
    )
