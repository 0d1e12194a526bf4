"""A stacked autoencoder, pretrained layer by layer, and a classifier on its code."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from dlops_dist.config.run import Run
from dlops_dist.config.section import Section
from dlops_dist.config.training import Ce, Data, Optimizer
from dlops_dist.errors import UserError

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


class StlData(Data):
    """Which samples, in which order."""

    shards: str = "shards/stl10"
    """Folder of packed shards, as written by launch/shard.py."""


class Autoencoders(Section):
    """A stack of autoencoders, and the classifier on its code."""

    layers: tuple[Annotated[int, Field(ge=1)], ...] = (1024, 1000, 500, 256, 128, 64)
    """Units of each encoder, from the pixels up."""
    code_layer: int = 128
    """The classifier reads the code of the layer with so many units."""
    tied: bool = False
    """Decode by the transposed weights of the encoder."""
    norm: Literal["none", "batch", "sync", "layer"] = "none"
    """Normalise each encoder's units before the ReLU: over the samples of a block, of all workers, or over the layer's
    units. sync: the code that the classifier reads, too."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Part of the units that the classifier's training drops: of the code, and with finetune of every layer below."""
    standardize: bool = True
    """Bring each channel's pixels (else parts of 255), and each unit of the code that the classifier reads, to mean 0
    and deviation 1."""

    @model_validator(mode="after")
    def _one_code_layer(self) -> Autoencoders:
        if self.layers.count(self.code_layer) != 1:
            raise ValueError(f"code_layer: {self.code_layer} must be one of the layers {list(self.layers)}, and once")
        return self


class PretrainOptimizer(Optimizer):
    """SGD of the autoencoders. The gradient is that of the squared error, as a part of the inputs' mean square."""

    lr: float = Field(0.4, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """L2 penalty on every parameter."""


class Pretrain(Section):
    """Greedy training of the autoencoders, one by one, each on the codes of those below."""

    epochs: int = Field(10, ge=1)
    """Passes over the images for each layer."""
    joint_epochs: int = Field(0, ge=0)
    """Passes for all layers together, unrolled, after the last."""
    unlabeled: bool = True
    """Train on the unlabeled images too, where the shards have them."""
    corruption: Literal["none", "masking", "gaussian"] = "none"
    """Reconstruct from inputs of which a part is set to 0, or to which noise is added."""
    corruption_level: float = Field(0.25, ge=0, lt=1)
    """masking: the part of the inputs. gaussian: the deviation of the noise."""
    codes_gb: float = Field(2.0, ge=0)
    """Keep the codes that a layer trains on in each worker's memory where they fit into so many GB, else compute
    them in every step."""
    optimizer: PretrainOptimizer = PretrainOptimizer()


class Settings(Run):
    """A stacked autoencoder, pretrained layer by layer, and a classifier on its code."""

    finetune: bool = False
    """Train the whole network on the labels; else only the linear classifier, on the frozen code."""
    folds: bool = False
    """After pretraining, train a classifier on each of the folds that the shards name."""
    data: StlData = StlData()
    model: Autoencoders = Autoencoders()
    pretrain: Pretrain = Pretrain()
    ce: Ce = Ce()

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
