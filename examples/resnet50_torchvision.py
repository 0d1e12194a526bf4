"""torchvision's ResNet-50 under cross-entropy; with --pretrained begun from its ImageNet weights.

python -m dlops_dist.train examples/resnet50_torchvision.py --local --data.shards shards/shapes
python -m dlops_dist.train examples/resnet50_torchvision.py --init-from resnet50.pth --freeze trunk.conv1 trunk.layer1
"""

from torch import nn
from torchvision.models import ResNet50_Weights, resnet50

import dlops_dist
from dlops_dist import CrossEntropyLoss, Embedder, Recipe


class Settings(dlops_dist.Run):
    """ResNet-50 of torchvision."""

    pretrained: bool = False
    """Begin with torchvision's ImageNet weights, which it downloads."""
    label_smoothing: float = 0.1
    """Probability spread evenly over all classes."""
    optimizer: dlops_dist.Optimizer = dlops_dist.Optimizer(lr=0.02)


def recipe(settings: Settings, inputs) -> Recipe:
    trunk = resnet50(weights=ResNet50_Weights.DEFAULT if settings.pretrained else None)
    trunk.fc = nn.Identity()
    return Recipe(
        Embedder(trunk, 2048, inputs.num_classes, inputs.image_size),
        {"ce": (1.0, CrossEntropyLoss(settings.label_smoothing))},
    )
