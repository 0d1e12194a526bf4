"""Groups of settings of training: its samples, their changes, the optimiser, cross-entropy."""

from typing import Literal

from pydantic import Field, model_validator

from dlops_dist.config.section import Section


class Data(Section):
    """Which samples, in which order."""

    shards: str = "shards/tiny-imagenet"
    """Folder of packed shards, as written by dlops_dist.shard."""
    order: Literal["auto", "uniform", "balanced"] = "auto"
    """uniform: a shuffle. balanced: P classes x K samples in each batch. auto: balanced for triplet, else uniform."""
    samples_per_class: int | None = Field(None, ge=2)
    """K of balanced batches; by default the least K >= 4 that divides the batch and for which P classes exist."""
    small_classes: Literal["leave-out", "repeat"] = "leave-out"
    """What balanced batches do with classes that have fewer than K samples. repeat: take these again until they are K;
    a class of one sample is then a positive of itself."""
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
    """Paint a square of so many pixels at a random place in the mean colour, or in black where
    model.standardize is off; 0 for none."""
    mixup: float = Field(0.0, ge=0)
    """Lay over each image the next one of the batch, labels too: a part of it by Beta(x, x); 0 for none."""
    cutmix: float = Field(0.0, ge=0)
    """Paste a box of the next image into each, whose area is such a part; with mixup, one or the other by a coin."""

    @property
    def mixes(self) -> bool:
        return bool(self.mixup or self.cutmix)


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
