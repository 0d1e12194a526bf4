"""Every setting of a run, typed and validated, and which of them change the result."""

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from dlops_dist.section import Section


class Data(Section):
    """Which samples, in which order."""

    shards: str = "shards/tiny-imagenet"
    """Folder of packed shards, as written by launch/shard.py."""
    order: Literal["auto", "uniform", "balanced"] = "auto"
    """uniform: a shuffle. balanced: P classes x K samples in each batch. auto: balanced for triplet, else uniform."""
    samples_per_class: int | None = Field(None, ge=2)
    """K of balanced batches; by default the least K >= 4 that divides the batch and for which P classes exist."""
    drop_last: bool = True
    """Leave out the last batch of an epoch when it is short (uniform order; balanced batches are always whole)."""
    val_fraction: float = Field(0.0, ge=0.0, lt=1.0)
    """Part of train held out, class by class, to choose settings on; never trained on."""
    reader: Literal["auto", "decode", "decoded", "device"] = "auto"
    """decode: each image when it is wanted. decoded: all once for each node, into a file that its workers share.
    device: all on the GPU. auto: the last of these that fits. All give the same bits."""
    cache_dir: str | None = None
    """Folder for decoded images on each node's own disk; by default one of yours in the temporary folder."""
    threads: int = Field(2, ge=1)
    """Threads that read and decode, in each worker."""
    prefetch: int = Field(4, ge=1)
    """Batches that are read ahead."""


class Augment(Section):
    """Random changes of the training images, keyed by (seed, epoch, sample): equal for any number of workers."""

    crop_padding: int = Field(4, ge=0)
    """Pad by so many pixels, then crop at a random place back to the size; 0 for none."""
    flip: bool = True
    """Mirror every second image, left to right."""
    resized_crop: float | None = Field(None, gt=0, le=1)
    """Instead of padding, cut out a part of at least this share of the area and enlarge it to the image's size."""
    brightness: float = Field(0.0, ge=0, le=1)
    """Multiply each image's brightness by a factor from 1 - x to 1 + x; so too contrast and saturation."""
    contrast: float = Field(0.0, ge=0, le=1)
    """The same of its contrast."""
    saturation: float = Field(0.0, ge=0, le=1)
    """The same of its saturation."""
    cutout: int = Field(0, ge=0)
    """Paint a square of so many pixels at a random place in the mean colour; 0 for none."""


class Model(Section):
    """ResNet-18."""

    stem: Literal["cifar", "imagenet"] = "cifar"
    """cifar: 3x3 convolution, stride 1, no pooling. imagenet: 7x7, stride 2, max-pool (10 times cheaper)."""
    width: int = Field(64, ge=8)
    """Channels of the first stage; the embedding has 8 times as many values. (Below 8, torch's own channels-last
    convolutions write beyond their memory on CPUs with AVX2.)"""
    norm: Literal["sync", "local"] = "sync"
    """Batch norm over all ranks (exact for any number of workers), or over each rank's own part."""


class Optimizer(Section):
    """SGD, and its learning rate over time."""

    lr: float = Field(0.1, gt=0)
    """Peak learning rate."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Weight of the last step's direction."""
    dampening: float = Field(0.0, ge=0, le=1)
    """Part of the gradient that does not enter the momentum."""
    nesterov: bool = False
    """Nesterov's look-ahead momentum (needs momentum > 0 and dampening 0)."""
    weight_decay: float = Field(5e-4, ge=0)
    """L2 penalty on every parameter."""
    clip_norm: float | None = Field(None, gt=0)
    """Clip the gradient's global norm at this value."""
    schedule: Literal["cosine", "one-cycle", "step", "constant"] = "cosine"
    """How the rate falls after the warm-up."""
    warmup_epochs: float = Field(1.0, ge=0)
    """Linear warm-up from 0 (one-cycle: the rising part of the cycle); at most half of the run."""
    step_epochs: int = Field(30, ge=1)
    """schedule step: the rate falls by step_gamma every so many epochs."""
    step_gamma: float = Field(0.1, gt=0, le=1)
    """schedule step: the factor."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "Optimizer":
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov needs momentum > 0 and dampening 0; pass --optimizer.no-nesterov")
        return self


class Ce(Section):
    """Cross-entropy."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Probability spread evenly over all classes."""


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


class Run(Section):
    """What every task has in common: where, how long, on what."""

    place: ClassVar[str | None] = ""
    config: str | None = None
    """YAML file of settings; by default the task's own in configs/."""
    name: str | None = Field(None, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._=-]*$")
    """Folder of the run under --runs-dir; by default task, loss and a hash of the settings that change the result."""
    runs_dir: str = "runs"
    """Folder of all runs; one that every node sees."""
    local: bool = False
    """Train in this one process, without Ray."""
    smoke: bool = False
    """A trial of a few seconds on generated images; implies --local."""
    workers: int | None = Field(None, ge=1)
    """Ray workers; by default the number of GPUs of the cluster, else 1."""
    wandb: Literal["online", "offline", "off"] = "off"
    """Log to Weights & Biases; offline needs neither key nor network."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Save a checkpoint every so many steps too, besides the end of each epoch."""
    epochs: int = Field(10, ge=1)
    """Passes over the training data."""
    global_batch_size: int = Field(128, ge=1)
    """Samples in one step, over all workers together."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Samples that go through the model at once, over all workers together; by default all of the step's."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the initial weights, the order and the augmentation."""
    precision: Literal["auto", "float32", "bf16", "float64"] = "auto"
    """auto: bf16 on GPUs that have it, else float32."""
    compile: bool | None = None
    """Use torch.compile; by default on GPUs."""
    deterministic: bool = True
    """Only kernels that give the same bits each time."""


class Q1(Run):
    """ResNet-18 classification under cross-entropy, triplet or centre loss."""

    loss: Literal["ce", "triplet", "center"] = "ce"
    """ce: cross-entropy. triplet: metric learning. center: cross-entropy plus centre loss."""
    data: Data = Data()
    augment: Augment = Augment()
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    ce: Ce = Ce()
    triplet: Triplet = Triplet()
    center: Center = Center()

    @property
    def variant(self) -> str:
        """What a run's name and result say of its settings."""
        return self.loss

    def total_epochs(self, num_folds: int) -> int:
        """Of all stages, on data with so many folds."""
        return self.epochs


class StlData(Data):
    """Which samples, in which order."""

    place: ClassVar[str | None] = "data"
    shards: str = "shards/stl10"
    """Folder of packed shards, as written by launch/shard.py."""


class Autoencoders(Section):
    """A stack of autoencoders, and the classifier on its code."""

    place: ClassVar[str | None] = "model"
    layers: tuple[Annotated[int, Field(ge=1)], ...] = (1024, 1000, 500, 256, 128, 64)
    """Units of each encoder, from the pixels up."""
    code_layer: int = 128
    """The classifier reads the code of the layer with so many units."""
    tied: bool = False
    """Decode by the transposed weights of the encoder."""
    norm: Literal["none", "batch", "layer"] = "none"
    """Normalise each encoder's units before the ReLU: over the samples of all ranks, or over the layer's units."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Part of the units that the classifier's training drops: of the code, and with finetune of every layer below."""
    standardize: bool = True
    """Bring each channel's pixels (else parts of 255), and each unit of the code that the classifier reads, to mean 0
    and deviation 1."""

    @model_validator(mode="after")
    def _one_code_layer(self) -> "Autoencoders":
        if self.layers.count(self.code_layer) != 1:
            raise ValueError(f"code_layer: {self.code_layer} must be one of the layers {list(self.layers)}, and once")
        return self


class PretrainOptimizer(Optimizer):
    """SGD of the autoencoders. The gradient is that of the squared error, as a part of the inputs' mean square."""

    place: ClassVar[str | None] = "pretrain.optimizer"
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


class Q2(Run):
    """A stacked autoencoder, pretrained layer by layer, and a classifier on its code."""

    finetune: bool = False
    """Train the whole network on the labels; else only the linear classifier, on the frozen code."""
    folds: bool = False
    """After pretraining, train a classifier on each of the folds that the shards name."""
    data: StlData = StlData()
    augment: Augment = Augment()
    model: Autoencoders = Autoencoders()
    pretrain: Pretrain = Pretrain()
    optimizer: Optimizer = Optimizer()
    ce: Ce = Ce()

    @property
    def variant(self) -> str:
        return ("finetuned" if self.finetune else "frozen") + ("-folds" if self.folds else "")

    def total_epochs(self, num_folds: int) -> int:
        pretraining = len(self.model.layers) * self.pretrain.epochs + self.pretrain.joint_epochs
        return pretraining + self.epochs * (num_folds if self.folds else 1)


Settings = Q1 | Q2
TASKS: dict[str, type[Q1] | type[Q2]] = {"q1": Q1, "q2": Q2}

SMOKE: dict[str, dict[str, Any]] = {
    "q1": {
        "smoke": True, "local": True, "epochs": 2, "global_batch_size": 40, "data": {"reader": "decode"},
        "model": {"width": 8, "stem": "imagenet"}, "augment": {"crop_padding": 2},
    },
    "q2": {
        "smoke": True, "local": True, "epochs": 4, "global_batch_size": 40, "data": {"reader": "decode"},
        "model": {"layers": (64, 48, 32), "code_layer": 48}, "pretrain": {"epochs": 2, "joint_epochs": 1},
    },
}  # fmt: skip
"""What --smoke changes for each task; its shards are made by the command line."""

MAY_CHANGE = frozenset({
    "config", "name", "runs_dir", "local", "smoke", "workers", "wandb", "checkpoint_every",
    "data.shards", "data.reader", "data.cache_dir", "data.threads", "data.prefetch",
})  # fmt: skip
"""Settings that may differ when a run goes on; all others change the result and are refused."""


def result_settings(settings: Run) -> dict[str, Any]:
    """The settings that change the result, as a flat {dotted name: value}."""
    return {name: value for name, value in _flat(settings.model_dump()).items() if name not in MAY_CHANGE}


def default_name(task: str, settings: Settings, dataset_id: str) -> str:
    """task-variant-hash: equal for two runs whose results must be equal."""
    content = json.dumps([result_settings(settings), dataset_id], sort_keys=True)
    return f"{task}-{settings.variant}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
