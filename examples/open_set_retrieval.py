"""Retrieval of classes that training never saw: test holds others than train, and is judged by Recall@k and MAP@R.

python -m dlops_dist.shard folder --source BIRDS --size 64         BIRDS/train/CLASS/..., BIRDS/test/OTHER_CLASS/...
python -m dlops_dist.train examples/open_set_retrieval.py --local --data.shards shards/BIRDS
"""

from pydantic import Field
from torch import nn
from torchvision.models import resnet18

import dlops_dist
from dlops_dist import CrossEntropyLoss, Embedder, Recipe, TripletLoss, recall_at


class Settings(dlops_dist.Run):
    """ResNet-18 embeddings under batch-hard triplets; the best epoch is that with the highest held-out Recall@1."""

    margin: float = Field(0.2, ge=0)
    """Of the triplets."""
    choose_by: str = "val/recall_at_1"
    data: dlops_dist.Data = dlops_dist.Data(val_fraction=0.1)
    optimizer: dlops_dist.Optimizer = dlops_dist.Optimizer(lr=0.01)


def recipe(settings: Settings, inputs) -> Recipe:
    trunk = resnet18()
    trunk.fc = nn.Linear(512, 64)
    return Recipe(
        Embedder(trunk, 64, inputs.num_classes, inputs.image_size),
        {"ce": (0.5, CrossEntropyLoss()), "triplet": (1.0, TripletLoss(settings.margin))},
        balanced=True,
        directions=True,
        metrics={f"recall_at_{k}": recall_at(k) for k in (2, 4, 8)},
    )
