"""A small vision transformer of timm, by AdamW: its dropout and drop-path are keyed by sample.

pip install 'dlops_dist[timm]'
python -m dlops_dist.train examples/vit_timm.py --local --data.shards shards/shapes
"""

import torch
from pydantic import Field
from timm.models.vision_transformer import VisionTransformer

import dlops_dist
from dlops_dist import CrossEntropyLoss, Embedder, Recipe


class Settings(dlops_dist.Run):
    """A vision transformer of timm."""

    patch_size: int = Field(8, ge=1)
    """Pixels of a patch's side."""
    width: int = Field(192, ge=8)
    """Values of a token."""
    depth: int = Field(6, ge=1)
    """Blocks."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Part of the values dropped after each projection."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Part of the samples that skip the last block; of those before it less."""
    optimizer: dlops_dist.Optimizer = dlops_dist.Optimizer(lr=1e-3, weight_decay=0.05, clip_norm=1.0)


def recipe(settings: Settings, inputs) -> Recipe:
    trunk = VisionTransformer(
        img_size=inputs.image_size, patch_size=settings.patch_size, embed_dim=settings.width, depth=settings.depth,
        num_heads=max(1, settings.width // 64), num_classes=0, proj_drop_rate=settings.dropout,
        drop_path_rate=settings.drop_path,
    )  # fmt: skip

    def adamw(named):
        decayed = [p for _, p in named if p.ndim > 1]
        others = [p for _, p in named if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": settings.optimizer.weight_decay}, {"params": others}]
        return torch.optim.AdamW(groups, settings.optimizer.lr, weight_decay=0)

    return Recipe(
        Embedder(trunk, settings.width, inputs.num_classes, inputs.image_size),
        {"ce": (1.0, CrossEntropyLoss(label_smoothing=0.1))},
        optimizer=adamw,
    )
