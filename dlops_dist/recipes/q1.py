"""ResNet-18 on images, under cross-entropy, triplet or centre loss.

ce:       CE
triplet:  triplet.ce_weight CE + triplet
center:   center.ce_weight CE + center.weight centre
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dlops_dist.config.run import Run
from dlops_dist.config.section import Section
from dlops_dist.config.training import Ce
from dlops_dist.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import: --help reads the settings alone
    from dlops_dist.engine.recipe import Recipe
    from dlops_dist.engine.samples import Inputs

DETACHED_HEAD_NORM = 8.0
"""Length of the embeddings that a head reads beside a loss of directions alone: SGD on the head is stable for
lr < 4 (1 + momentum) / norm^2, about 0.12."""
SMOKE = {"model": {"width": 8, "stem": "imagenet"}, "augment": {"crop_padding": 2}}
STUDY = {
    "ce": {"train/loss": 0.12, "train/top1": 0.7225, "test/loss": 1.567, "test/top5": 0.5936},
    "triplet": {"train/loss": 0.092, "train/top1": 0.7989, "test/loss": 0.76, "test/top1": 0.65},
    "center": {"train/loss": 0.04, "train/top1": 0.7566, "test/loss": 0.85, "test/top1": 0.6345},
}
STUDY_DATA = ("tiny-imagenet", 200)
"""Dataset of those figures, and how many classes it has."""


class Model(Section):
    """ResNet-18."""

    stem: Literal["cifar", "imagenet"] = "cifar"
    """cifar: 3x3 convolution, stride 1, no pooling. imagenet: 7x7, stride 2, max-pool (10 times cheaper)."""
    width: int = Field(64, ge=1)
    """Channels of the first stage; the embedding has 8 times as many values."""
    norm: Literal["block", "sync", "local"] = "block"
    """Batch norm over each block of the batch (the same bits for any number of workers), over all ranks (equal up to
    rounding), or over each rank's own part."""


class Triplet(Section):
    """Triplet loss, mined over the global batch."""

    margin: float = Field(0.5, ge=0)
    """A negative counts as far enough once it is this much farther than the positive."""
    mining: Literal["batch-hard", "semi-hard", "all"] = "batch-hard"
    """Which triplets of the batch are used."""
    normalize: bool = True
    """L2-normalise the embeddings first."""
    squared: bool = False
    """Squared Euclidean distances."""
    average: Literal["valid", "active"] = "valid"
    """Mean over all valid triplets, or over those with a loss above 0."""
    ce_weight: float = Field(0.0, ge=0)
    """Weight of the added cross-entropy; at 0 the head learns on detached embeddings."""


class Center(Section):
    """Centre loss."""

    weight: float = Field(0.01, ge=0)
    """Weight of the centre term."""
    alpha: float = Field(0.5, gt=0, le=1)
    """Step of the centres towards their class means."""
    ce_weight: float = Field(1.0, ge=0)
    """Weight of the cross-entropy; at 0 the head learns on detached embeddings."""


class Settings(Run):
    """ResNet-18 classification under cross-entropy, triplet or centre loss."""

    loss: Literal["ce", "triplet", "center"] = "ce"
    """ce: cross-entropy. triplet: metric learning. center: cross-entropy plus centre loss."""
    model: Model = Model()
    ce: Ce = Ce()
    triplet: Triplet = Triplet()
    center: Center = Center()

    @property
    def variant(self) -> str:
        return self.loss

    @property
    def unused(self) -> tuple[str, ...]:
        return tuple(f"{loss}." for loss in ("triplet", "center") if loss != self.loss)

    def check_search(self, names: Collection[str]) -> None:
        for name in names:
            owner = name.partition(".")[0]
            if owner in ("triplet", "center") and owner != self.loss and "loss" not in names:
                raise UserError(f"space: {name} changes nothing with --loss {self.loss}; name others by --space")


def recipe(settings: Settings, inputs: Inputs) -> Recipe:
    from torch import nn

    from dlops_dist.distributed.norm import BlockBatchNorm2d, SyncBatchNorm2d
    from dlops_dist.engine.recipe import Recipe
    from dlops_dist.losses import CenterLoss, CrossEntropyLoss, TripletLoss
    from dlops_dist.models.resnet import resnet18

    chosen, triplet, center = settings.model, settings.triplet, settings.center
    norm = {"block": BlockBatchNorm2d, "sync": SyncBatchNorm2d, "local": nn.BatchNorm2d}[chosen.norm]
    only_directions = settings.loss == "triplet" and triplet.normalize and triplet.ce_weight == 0
    model = resnet18(
        inputs.num_classes, chosen.stem, chosen.width, norm, DETACHED_HEAD_NORM if only_directions else None
    )
    ce = CrossEntropyLoss(settings.ce.label_smoothing)
    if settings.loss == "triplet":
        loss = TripletLoss(triplet.margin, triplet.mining, triplet.normalize, triplet.squared, triplet.average)
        return Recipe(
            model, {"ce": (triplet.ce_weight, ce), "triplet": (1.0, loss)}, balanced=True, directions=triplet.normalize
        )
    if settings.loss == "center":
        centers = CenterLoss(inputs.num_classes, model.embedding_dim, center.alpha)
        return Recipe(model, {"ce": (center.ce_weight, ce), "center": (center.weight, centers)})
    return Recipe(model, {"ce": (1.0, ce)})
