"""What q2 can be told: of its data, its layers, their pretraining and the classifier."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dlops_dist.config.run import Run
from dlops_dist.config.section import Section
from dlops_dist.config.training import Ce, Data, Optimizer


class StlData(Data):
    """Which samples, in which order."""

    shards: str = "shards/stl10"
    """Folder of packed shards, as written by dlops_dist.shard."""


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
    def _one_code_layer(self) -> Self:
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


class Stack(Run):
    """A stacked autoencoder, pretrained layer by layer, and a classifier on its code."""

    finetune: bool = False
    """Train the whole network on the labels; else only the linear classifier, on the frozen code."""
    folds: bool = False
    """After pretraining, train a classifier on each of the folds that the shards name."""
    data: StlData = StlData()
    model: Autoencoders = Autoencoders()
    pretrain: Pretrain = Pretrain()
    ce: Ce = Ce()
