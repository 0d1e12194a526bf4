"""From an order of ids to batches on the device, read ahead by threads."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dlops_dist.data import order
from dlops_dist.data.order import Ids
from dlops_dist.data.readers import Reader
from dlops_dist.errors import UserError


class Batch(NamedTuple):
    """One rank's part of a global batch, or of a micro-batch of it."""

    images: Tensor
    """uint8 (n, H, W, 3), on the device."""
    ids: Tensor
    """(n,): sample ids, on the device."""
    labels: Tensor
    """(G,): of the whole (micro-)batch, on the device."""
    part: slice
    """Where this rank's samples stand in it."""


class TrainingOrder:
    """The global batches of every epoch of a run: a pure function of its arguments.

    Args:
        ids: the samples to train on; those held out are left out.
        labels: (N,) of all samples of the split.
        samples_per_class: K for P x K batches; None for a uniform shuffle.
    """

    def __init__(
        self, ids: Ids, labels: Ids, seed: int, global_batch_size: int, samples_per_class: int | None, drop_last: bool
    ) -> None:
        self._ids, self._labels, self._seed = ids, labels[ids], seed
        self._batch_size, self._samples_per_class, self._drop_last = global_batch_size, samples_per_class, drop_last
        self.num_samples = len(ids)
        self.steps_per_epoch = len(self.epoch(0))
        if self.steps_per_epoch == 0:
            raise UserError(f"global_batch_size: {global_batch_size} is more than {len(ids)} training samples can fill")

    def epoch(self, epoch: int) -> list[Ids]:
        """The global batches of an epoch, as sample ids."""
        size, batch_size, k = len(self._ids), self._batch_size, self._samples_per_class
        if k is not None:
            return list(self._ids[order.balanced_epoch(self._seed, epoch, self._labels, batch_size, k)])
        batches = list(self._ids[order.uniform_epoch(self._seed, epoch, size, batch_size)])
        if size % batch_size and not self._drop_last:
            batches.append(self._ids[order.last_batch(self._seed, epoch, size, batch_size)])
        return batches


def read_ahead(
    reader: Reader, parts: Iterable[tuple[Ids, slice]], device: torch.device, threads: int, prefetch: int
) -> Iterator[Batch]:
    """Batches in order; for each, the global ids and this rank's part of them. `prefetch` more are under way.

    What lies in memory is read when it is asked for: a thread would take longer to hand it over than to copy it.
    """
    pin = device.type == "cuda"

    def load(global_ids: Ids, part: slice) -> list[Tensor]:
        ids = np.ascontiguousarray(global_ids[part])
        tensors = [torch.as_tensor(a) for a in (reader.read(ids), ids, reader.labels[global_ids])]
        return [t.pin_memory() if pin and not t.is_cuda else t for t in tensors]

    if reader.in_memory and device.type == "cpu":
        for ids, part in parts:
            images, own_ids, labels = load(ids, part)
            yield Batch(images, own_ids, labels, part)
        return
    with ThreadPoolExecutor(threads, "reader", _use, (device,)) as pool:
        remaining = iter(parts)
        flying: deque[tuple[slice, Future[list[Tensor]]]] = deque()
        try:
            while True:
                for ids, part in islice(remaining, prefetch + 1 - len(flying)):
                    flying.append((part, pool.submit(load, ids, part)))
                if not flying:
                    return
                part, future = flying.popleft()
                images, own_ids, labels = (t.to(device, non_blocking=True) for t in future.result())
                yield Batch(images, own_ids, labels, part)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _use(device: torch.device) -> None:
    """Make a GPU this thread's own: it would register its pinned memory with the first one."""
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
