"""The samples of a run, and in which batches they are trained on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from dlops_dist.config import Run
from dlops_dist.data.crops import opened
from dlops_dist.data.loader import Batches, TrainingOrder
from dlops_dist.data.order import Ids, fit_samples_per_class, hold_out
from dlops_dist.data.readers import Reader
from dlops_dist.data.shards import Manifest, Split
from dlops_dist.errors import UserError

SHOWN_CLASSES = 3


class Inputs(NamedTuple):
    """What a model must know of the data that it was trained on."""

    num_classes: int
    mean: tuple[float, ...]
    """Of each channel, as a part of 255; so is std."""
    std: tuple[float, ...]
    image_size: tuple[int, int] = (64, 64)
    """(height, width)"""


class Samples:
    """The samples of a run: those to train on, those held out, those to test on, those without a label."""

    def __init__(self, shards: Path, manifest: Manifest, settings: Run) -> None:
        data = settings.data
        self.manifest = manifest
        names = [name for name in settings.splits if name in ("train", "test") or name in manifest.splits]
        self._splits = [opened(shards, manifest, name, settings.augment) for name in names]
        self.open(list)
        self.folds = self._splits[0].folds
        if (self.train.labels < 0).any() or (self.test.labels < 0).any():
            raise UserError(f"data.shards: {data.shards}: samples without a label among those of train or test")
        self.ids, self.val_ids = hold_out(self.train.labels, data.val_fraction)
        if not len(self.ids) or (data.val_fraction and not len(self.val_ids)):
            raise UserError(
                f"data.val_fraction: {data.val_fraction} leaves {len(self.ids)} to train and "
                f"{len(self.val_ids)} held out"
            )
        mean, std = (manifest.mean, manifest.std) if settings.standardized else ((0.0,) * 3, (1.0,) * 3)
        self.inputs = Inputs(len(manifest.classes), mean, std, self._splits[0].size)

    def open(self, open_readers: Callable[[Sequence[Split]], list[Reader]]) -> None:
        """Read images by these readers from now on."""
        self.train, self.test, *others = open_readers(self._splits)
        self.unlabeled = others[0] if others else None


def training_order(
    settings: Run, samples: Samples, ids: Ids, balanced: bool = False, batches: Batches | None = None
) -> TrainingOrder:
    """The batches of every epoch of labelled samples; those of a recipe, balanced or not, where data.order is auto."""
    data, batch_size = settings.data, settings.global_batch_size
    balanced = data.order == "balanced" or (data.order == "auto" and balanced)
    samples_per_class = (
        fit_samples_per_class(batch_size, len(samples.manifest.classes), data.samples_per_class) if balanced else None
    )
    repeat = data.small_classes == "repeat"
    labels = samples.train.labels
    batches = batches if data.order == "auto" else None
    return TrainingOrder(ids, labels, settings.seed, batch_size, samples_per_class, data.drop_last, repeat, batches)


def balance_notices(order: TrainingOrder, classes: Sequence[str]) -> list[str]:
    """Which samples balanced batches leave out, and for how long others wait, if there is anything to say."""
    balance = order.balance
    if balance is None:
        return []
    parts = []
    if len(balance.left_out):
        k, names = balance.samples_per_class, [classes[c] for c in balance.left_out.tolist()]
        left_out = int(balance.sizes[balance.left_out].sum())
        parts.append(
            f"leave out {left_out} of {order.num_samples:,} samples, of {len(names)} classes with fewer than {k}: "
            f"{', '.join(names[:SHOWN_CLASSES])}{', ...' * (len(names) > SHOWN_CLASSES)}; a lower "
            f"--data.samples-per-class or --data.small-classes repeat takes them"
        )
    if balance.rounds > 2:
        parts.append(f"take a part of the larger classes in each epoch, and all of them within {balance.rounds} epochs")
    return [f"data.order: balanced batches {', and '.join(parts)}"] if parts else []
