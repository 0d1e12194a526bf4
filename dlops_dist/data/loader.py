"""From an order of ids to batches on the device, read ahead by threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dlops_dist.data import order
from dlops_dist.data.order import Ids
from dlops_dist.data.readers import Reader, copied_ahead
from dlops_dist.errors import RunError, UserError

Batches = Callable[[int, int, Ids], Sequence[Ids]]
SHOWN = 8
"""Class sizes that an error names."""


class Batch(NamedTuple):
    """One rank's part of a global batch, or of a micro-batch of it."""

    images: Tensor
    """uint8 (n, H, W, 3), on the device; perhaps with the sample after this rank's part."""
    ids: Tensor
    """(n,): their samples' ids, on the device."""
    labels: Tensor
    """(G,): of the whole (micro-)batch, on the device."""
    part: slice
    """Where this rank's samples stand in it."""
    host_labels: Ids
    """The labels once more, on the host, where what depends on them is found without waiting for a GPU."""

    def part_of(self, part: slice, and_next: bool) -> "Batch":
        """Those of this rank's samples that stand in a smaller part, perhaps with the sample after them."""
        own = slice(part.start - self.part.start, part.stop - self.part.start + and_next)
        return self._replace(images=self.images[own], ids=self.ids[own], part=part)


class TrainingOrder:
    """The global batches of every epoch of a run: a pure function of its arguments.

    Args:
        ids: the samples to train on; those held out are left out.
        labels: (N,) of all samples of the split.
        samples_per_class: K for P x K batches; None for a uniform shuffle.
        repeat: in P x K batches, take samples of classes with fewer than K again; else these are left out.
        batches: another order than these: (seed, epoch, labels of the ids) -> batches of places among the ids.
    """

    def __init__(
        self, ids: Ids, labels: Ids, seed: int, global_batch_size: int, samples_per_class: int | None, drop_last: bool,
        repeat: bool = False, batches: Batches | None = None,
    ) -> None:  # fmt: skip
        self._ids, self._seed, self._batch_size, self._drop_last = ids, seed, global_batch_size, drop_last
        self._batches = batches
        self.balance: order.Balance | None = None
        self.num_samples = size = len(ids)
        if batches is not None:
            self._labels = labels[ids].astype(np.int64)
            self.steps_per_epoch = len(self._of_recipe(0))
        elif samples_per_class is not None:
            of_ids = labels if size == len(labels) else labels[ids]
            self.balance = order.Balance(of_ids, global_batch_size, samples_per_class, repeat)
            self.steps_per_epoch = self.balance.num_batches
            if not self.steps_per_epoch:
                raise UserError(_unfilled(self.balance))
        else:
            self.steps_per_epoch = size // global_batch_size + (size % global_batch_size > 0 and not drop_last)
        if self.steps_per_epoch == 0:
            raise UserError(f"global_batch_size: {global_batch_size} is more than {size} training samples can fill")

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Ids]:
        """The global batches of an epoch from its `first` step on, as sample ids."""
        if self._batches is not None:
            places: Iterable[Ids] = self._of_recipe(epoch)[first:]
        elif self.balance is not None:
            places = self.balance.epoch(self._seed, epoch, first)
        else:
            size = self.num_samples
            places = order.uniform_epoch(self._seed, epoch, size, self._batch_size, self._drop_last, first)
        return (self._ids[of_batch].astype(np.int64) for of_batch in places)

    def _of_recipe(self, epoch: int) -> list[Ids]:
        """Places of a recipe's own batches, looked at before they are used."""
        batches = self._batches(self._seed, epoch, self._labels) if self._batches is not None else ()
        if not isinstance(batches, Iterable):
            raise RunError(f"batches must give a list of batches, not a {type(batches).__name__}")
        places = [np.asarray(batch) for batch in batches]
        number = getattr(self, "steps_per_epoch", len(places))
        if not places:
            raise RunError(f"batches: epoch {epoch} has none")
        if len(places) != number:
            raise RunError(f"batches: epoch {epoch} has {len(places)} batches, the first has {number}: all must have")
        for place in places:
            if place.ndim != 1 or place.dtype.kind not in "iu" or not len(place):
                raise RunError("batches: each must be places among the samples, one-dimensional whole numbers")
            outside = place[(place < 0) | (place >= self.num_samples)]
            if len(outside):
                raise RunError(f"batches: places must be from 0 to {self.num_samples - 1}, not {outside[0]}")
            if len(place) != self._batch_size:
                raise RunError(
                    f"batches: each must have global_batch_size {self._batch_size} samples, not {len(place)}"
                )
        return places


def _unfilled(balance: order.Balance) -> str:
    """Why not one balanced batch can be made, and what to do."""
    k, sizes = balance.samples_per_class, sorted(balance.sizes.tolist(), reverse=True)
    shown = ", ".join(map(str, sizes[:SHOWN])) + ", ..." * (len(sizes) > SHOWN)
    enough = sum(size >= k for size in sizes)
    size = balance.classes_per_batch * k
    return (
        f"global_batch_size: {size} is {balance.classes_per_batch} classes with {k} samples each "
        f"(data.samples_per_class), and {enough} of {len(sizes)} classes have so many (sizes {shown}); pass a "
        f"lower --data.samples-per-class or --global-batch-size, --data.small-classes repeat, or --data.order uniform"
    )


def read_ahead(
    reader: Reader, parts: Iterable[tuple[Ids, slice]], device: torch.device, threads: int, prefetch: int,
    and_next: bool = False,
) -> Iterator[Batch]:  # fmt: skip
    """Batches in order; for each, the global ids and this rank's part of them. `prefetch` more are under way.

    What lies in memory is read when it is asked for: a thread would take longer to hand it over than to copy it.

    Args:
        and_next: read the image after this rank's part, too; after the last one the first.
    """

    def load(global_ids: Ids, part: slice) -> Batch:
        places = np.arange(part.start, part.stop + and_next)
        ids, labels = global_ids.take(places, mode="wrap").astype(np.int64), reader.labels[global_ids].astype(np.int64)
        images, own_ids, all_labels = (copied_ahead(a, device) for a in (reader.read(ids), ids, labels))
        return Batch(images, own_ids, all_labels, part, labels)

    def moved(batch: Batch) -> Batch:
        images, ids, labels = (tensor.to(device, non_blocking=True) for tensor in batch[:3])
        return batch._replace(images=images, ids=ids, labels=labels)

    if reader.in_memory:
        for ids, part in parts:
            yield moved(load(ids, part))
        return
    with ThreadPoolExecutor(threads, "reader", _use, (device,)) as pool:
        remaining = iter(parts)
        flying: deque[Future[Batch]] = deque()
        try:
            while True:
                flying.extend(pool.submit(load, *wanted) for wanted in islice(remaining, prefetch + 1 - len(flying)))
                if not flying:
                    return
                yield moved(flying.popleft().result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _use(device: torch.device) -> None:
    """Make a GPU this thread's own: it would register its pinned memory with the first one."""
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
