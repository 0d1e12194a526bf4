"""A model with a head, and the terms of the chosen loss."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dlops_dist.config import Q1, Settings
from dlops_dist.data.augment import Normalize
from dlops_dist.distributed.norm import SyncBatchNorm2d
from dlops_dist.losses import CenterLoss, CrossEntropyLoss, Terms, TripletLoss
from dlops_dist.models.autoencoder import StackedAutoencoderClassifier
from dlops_dist.models.resnet import ResNet, resnet18

Classifier = ResNet | StackedAutoencoderClassifier

DETACHED_HEAD_NORM = 8.0
"""Length of the embeddings that a head reads beside a loss of directions alone: SGD on the head is stable for
lr < 4 (1 + momentum) / norm^2, about 0.12."""


def build_resnet(settings: Q1, num_classes: int) -> ResNet:
    """The network of q1, its initial weights a function of the seed alone."""
    norm = SyncBatchNorm2d if settings.model.norm == "sync" else nn.BatchNorm2d
    only_directions = settings.loss == "triplet" and settings.triplet.normalize and settings.triplet.ce_weight == 0
    embedding_norm = DETACHED_HEAD_NORM if only_directions else None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        return resnet18(num_classes, settings.model.stem, settings.model.width, norm, embedding_norm)


class TwoOutputs(nn.Module):
    """Embeddings (N, D) and logits (N, C) of uint8 images (N, H, W, 3): the module that DDP and compile wrap.

    With `detach_head` the head learns on embeddings that its loss does not change.
    """

    def __init__(self, normalize: Normalize, model: Classifier, detach_head: bool) -> None:
        super().__init__()
        self.normalize, self.model, self.detach_head = normalize, model, detach_head

    def forward(self, images: Tensor, *draws: Tensor) -> tuple[Tensor, Tensor]:
        """`draws` are the random numbers that the model takes in training, if it takes any."""
        embeddings = self.model.embed(self.normalize(images), *draws)
        logits = self.model.fc(embeddings.detach() if self.detach_head else embeddings)
        return embeddings, logits


class ClassificationLoss(nn.Module):
    """Which losses a run has, with which weights:

        ce, q2:   CE
        triplet:  triplet.ce_weight CE + triplet
        center:   center.ce_weight CE + center.weight centre

    Where the weight of CE is 0, the head alone still learns from it, on detached embeddings.
    """

    def __init__(self, settings: Settings, num_classes: int, embedding_dim: int) -> None:
        super().__init__()
        self.cross_entropy = CrossEntropyLoss(settings.ce.label_smoothing)
        self.triplet: TripletLoss | None = None
        self.center: CenterLoss | None = None
        self.weights: dict[str, float] = {"ce": 1.0}
        if isinstance(settings, Q1) and settings.loss == "triplet":
            chosen = settings.triplet
            self.triplet = TripletLoss(chosen.margin, chosen.mining, chosen.normalize, chosen.squared, chosen.average)
            self.weights = {"ce": chosen.ce_weight, "triplet": 1.0}
        if isinstance(settings, Q1) and settings.loss == "center":
            self.center = CenterLoss(num_classes, embedding_dim, settings.center.alpha)
            self.weights = {"ce": settings.center.ce_weight, "center": settings.center.weight}
        self.unit_length = self.triplet is not None and self.triplet.normalize

    @property
    def detach_head(self) -> bool:
        return self.weights["ce"] == 0

    @property
    def backward_weights(self) -> dict[str, float]:
        """The weights of what is back-propagated: a head on detached embeddings learns with weight 1."""
        return self.weights | {"ce": self.weights["ce"] or 1.0}

    def terms(self, embeddings: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Terms]:
        """The terms of some samples that know nothing of others; those of triplets are not among them."""
        terms = {"ce": self.cross_entropy.terms(logits, labels)}
        if self.center is not None:
            terms["center"] = self.center.terms(embeddings, labels)
        return terms

    def total(self, values: Mapping[str, float | None]) -> float | None:
        """The loss of a run from its parts; None where one of them is of nothing."""
        parts = [(weight, values[name]) for name, weight in self.weights.items() if weight]
        return None if any(v is None for _, v in parts) else sum(w * v for w, v in parts if v is not None)
