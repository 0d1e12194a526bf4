"""A stacked autoencoder, pretrained layer by layer, and a classifier on its code."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from dlops_dist.errors import UserError
from dlops_dist.recipes.stacked.settings import Stack

if TYPE_CHECKING:  # torch takes seconds to import: --help reads the settings alone
    import torch

    from dlops_dist.engine.recipe import Recipe
    from dlops_dist.engine.samples import Inputs, Samples
    from dlops_dist.engine.stages import Stage

SMOKE = {
    "epochs": 4, "model": {"layers": (64, 48, 32), "code_layer": 48}, "pretrain": {"epochs": 2, "joint_epochs": 1},
}  # fmt: skip
SMOKE_DATASET = "shapes-stl10"
STUDY = {"q2": {"train/loss": 1.29, "train/top1": 0.4799, "test/loss": 1.51, "test/top1": 0.5231}}
STUDY_CLASSES = (0.5123, 0.8234, 0.0345, 0.4456, 0.0789, 0.7734, 0.1528, 0.6556, 0.5512)
"""Class-wise test accuracies, classes 1 to 9: the study names no tenth."""
STUDY_DATA = ("stl10", 10)


class Settings(Stack):
    """A stacked autoencoder, pretrained layer by layer, and a classifier on its code."""

    @property
    def variant(self) -> str:
        return ("finetuned" if self.finetune else "frozen") + ("-folds" if self.folds else "")

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "test", "unlabeled") if self.pretrain.unlabeled else ("train", "test")

    @property
    def standardized(self) -> bool:
        return self.model.standardize

    def total_epochs(self, num_folds: int) -> int:
        pretraining = len(self.model.layers) * self.pretrain.epochs + self.pretrain.joint_epochs
        return pretraining + self.epochs * (num_folds if self.folds else 1)

    def check_search(self, names: Collection[str]) -> None:
        if self.folds:
            raise UserError("folds: a sweep chooses on data.val_fraction; leave out --folds")


def recipe(settings: Settings, inputs: Inputs) -> Recipe:
    """The classifier, on encoders that are yet to be trained."""
    from dlops_dist.recipes.stacked.stages import build_stack, classifier

    return classifier(settings, inputs, build_stack(settings, inputs))


def stages(settings: Settings, samples: Samples, device: torch.device, tell: Callable[[str], None]) -> list[Stage]:
    """Each layer's pretraining, all layers unrolled, then the classifier, or one for each fold."""
    from dlops_dist.recipes.stacked.stages import stacked_stages

    return stacked_stages(settings, samples, device, tell)
