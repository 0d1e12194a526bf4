"""The settings that every run has, and which of them change the result."""

import hashlib
import json
import os
from collections.abc import Collection
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from dlops_dist.config.section import Section, mistake_in
from dlops_dist.config.training import Augment, Data, Optimizer
from dlops_dist.errors import UserError

WANDB_MODES: dict[str, Literal["online", "offline", "off"]] = {
    "": "off", "online": "online", "run": "online", "shared": "online", "offline": "offline", "dryrun": "offline",
    "disabled": "off",
}  # fmt: skip


def wandb_of_environment() -> Literal["online", "offline", "off"]:
    """What W&B's own variables say of whether to log."""
    mode = os.environ.get("WANDB_MODE", "")
    if mode not in WANDB_MODES:
        raise UserError(f"WANDB_MODE={mode}: must be one of {', '.join(filter(None, WANDB_MODES))}")
    disabled = os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on")
    return "off" if disabled else WANDB_MODES[mode]


class Run(Section):
    """What every run has: where, how long, on what, by which optimiser."""

    source: ClassVar[str | None] = None
    """Hash of the user's recipe that they are for: another one makes another run."""
    config: str | None = None
    """YAML file of settings, or the name of one in configs/ (quickstart); by default the task's own there."""
    name: str | None = Field(None, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._=-]*$")
    """Folder of the run under --runs-dir; by default task, loss and a hash of the settings that change the result."""
    runs_dir: str = "runs"
    """Folder of all runs; one that every node sees, or a URL (s3://, gs:// ...)."""
    local: bool = False
    """Train in this one process, without Ray."""
    smoke: bool = False
    """A trial of a few seconds on generated images; implies --local."""
    workers: int | None = Field(None, ge=1)
    """Ray workers; by default the number of GPUs of the cluster, else 1."""
    min_workers: int | None = Field(None, ge=1)
    """Go on with as few Ray workers as this where nodes are lost, and with all again once they are back; by default
    wait for as many."""
    max_restarts: int = Field(3, ge=0)
    """How often all Ray workers, or a trial of a sweep, are started again, from the last checkpoint, after a loss."""
    node_wait: int = Field(900, ge=0)
    """Seconds that Ray workers wait for a node in place of one that is lost."""
    collective_timeout: int = Field(300, ge=1)
    """Seconds after which a worker that hears nothing of the others gives up."""
    wandb: Literal["online", "offline", "off"] = Field(default_factory=wandb_of_environment)
    """Log to Weights & Biases; offline needs neither key nor network. By default as WANDB_MODE says, else off."""
    tensorboard: bool = False
    """Write the figures for TensorBoard too, into the run's folder (needs 'dlops_dist[tensorboard]')."""
    log_every: int = Field(50, ge=0)
    """Log loss, rate, gradient norm and more every so many steps, in steps.jsonl, W&B and TensorBoard; 0 for never."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Save a checkpoint every so many steps too, besides the end of each epoch."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the latest checkpoints to keep, besides the best where data.val_fraction holds samples out."""
    epochs: int = Field(10, ge=1)
    """Passes over the training data."""
    global_batch_size: int = Field(128, ge=1)
    """Samples in one step, over all workers together."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Samples that go through the model at once, over all workers together; by default all of the step's."""
    exactness: Literal["bits", "rounding"] | None = None
    """bits: refuse what any number of workers could not compute to the same bits. rounding: let workers differ by
    rounding, and each compute its part of a batch at once. By default bits, where that can be had."""
    blocks: int | None = Field(None, ge=1)
    """Parts that a batch is cut into, each computed on its own, by whichever worker: as many workers at most give the
    same bits. By default the largest power of two, up to 8, that leaves 32 samples to each."""
    threads_per_block: int = Field(1, ge=1)
    """On a CPU, threads that compute a block: their number may change its bits. A worker with more cores computes
    several blocks at once."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the initial weights, the order and the augmentation."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Evaluate an exponential moving average of the classifier's weights, which keeps this part of itself in each
    step (0.999, say); 0 for the weights themselves."""
    flip_test: bool = False
    """Evaluate each image and its mirror image, and take the mean of their embeddings and logits."""
    precision: Literal["auto", "float32", "bf16", "float64"] = "auto"
    """auto: bf16 on GPUs that have it, else float32."""
    compile: bool | None = None
    """Use torch.compile; by default on GPUs."""
    deterministic: bool = True
    """Only kernels that give the same bits each time."""
    inexact: bool = False
    """Train a model that cannot be the same for any number of workers, with a warning, instead of refusing it."""
    init_from: str | None = None
    """Begin with the weights of a run (its folder or URL) or of a file; those that do not fit are named."""
    freeze: tuple[str, ...] = ()
    """Parts of the model, by their names, whose weights and statistics stay as they are."""
    choose_by: str = "val/top1"
    """The held-out figure by which the best epoch of a run, and the best point of a sweep, are chosen: the highest, of
    a loss the lowest."""
    patience: int | None = Field(None, ge=1)
    """End the run once so many epochs have not bettered choose_by."""
    data: Data = Data()
    augment: Augment = Augment()
    optimizer: Optimizer = Optimizer()

    @model_validator(mode="after")
    def _parts_are_decoded(self) -> Self:
        if self.augment.size is not None and self.data.reader in ("decoded", "device"):
            raise ValueError(
                f"data.reader: {self.data.reader} holds whole images of one size, and augment.size cuts a part out of "
                f"each as it is decoded; leave out --data.reader"
            )
        return self

    @field_validator("choose_by")
    @classmethod
    def _is_held_out(cls, name: str) -> str:
        if not name.startswith("val/"):
            raise ValueError("was not held out; name a figure of val/, such as val/top1")
        return name

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise mistake_in(type(self), error) from None

    @property
    def variant(self) -> str:
        """What a run's name and result say of its settings."""
        return ""

    @property
    def splits(self) -> tuple[str, ...]:
        """Of the shards, those to read: train and test, and what else is there of these."""
        return "train", "test"

    @property
    def standardized(self) -> bool:
        """Whether each channel's pixels are brought to mean 0 and deviation 1; else they are parts of 255."""
        return True

    @property
    def unused(self) -> tuple[str, ...]:
        """What the dotted names begin with of settings that others leave without effect: they may differ on resume."""
        return ()

    def total_epochs(self, num_folds: int) -> int:
        """Of all stages, on data with so many folds."""
        return self.epochs

    def check_search(self, names: Collection[str]) -> None:
        """Refuse a sweep over settings of these names that could not find anything."""


LATER: dict[str, Any] = {
    "init_from": None, "freeze": (), "choose_by": "val/top1", "patience": None, "augment.mixup": 0.0,
    "augment.cutmix": 0.0, "exactness": None, "blocks": None, "threads_per_block": 1, "augment.size": None,
    "augment.center_crop": 0.875, "augment.largest_crop": 1.0, "augment.aspect": (3 / 4, 4 / 3),
}  # fmt: skip
"""Settings that earlier versions did not have, and their defaults, with which a run is what it was without them."""
MAY_CHANGE = frozenset({
    "config", "name", "runs_dir", "local", "smoke", "workers", "min_workers", "max_restarts", "node_wait",
    "collective_timeout", "wandb", "tensorboard", "log_every", "inexact",
    "checkpoint_every", "keep_checkpoints",
    "data.shards", "data.reader", "data.cache_dir", "data.threads", "data.prefetch",
    "num_samples", "seeds", "concurrency", "scheduler",
})  # fmt: skip
"""Settings that may differ when a run, or a sweep, goes on; all others change the result and are refused."""


def result_settings(settings: Run) -> dict[str, Any]:
    """The settings that change the result, as a flat {dotted name: value}."""
    values = flat(settings.model_dump()).items()
    found = {n: v for n, v in values if n not in MAY_CHANGE and (n not in LATER or v != LATER[n])}
    return found if settings.source is None else {**found, "recipe": settings.source}


def default_name(recipe: str, settings: Run, dataset_id: str) -> str:
    """recipe-variant-hash: equal for two runs whose results must be equal."""
    content = json.dumps([result_settings(settings), dataset_id], sort_keys=True)
    return f"{'-'.join(filter(None, (recipe, settings.variant)))}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {dotted name: value}."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return result


def common_settings(values: dict[str, Any]) -> Run:
    """Those settings that every run has, of a run with more."""
    return Run(**_known(Run, values))


def _known(section: type[Section], values: dict[str, Any]) -> dict[str, Any]:
    fields = {name: field.annotation for name, field in section.model_fields.items() if name in values}
    return {
        name: _known(kind, values[name]) if isinstance(kind, type) and issubclass(kind, Section) else values[name]
        for name, kind in fields.items()
    }
