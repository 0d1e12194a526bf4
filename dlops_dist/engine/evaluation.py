"""Exact evaluation: every sample once, the same figures for any number of workers."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dlops_dist.data.loader import Batch, read_ahead
from dlops_dist.data.order import Ids, blocks, rank_part
from dlops_dist.data.readers import Reader, on_device
from dlops_dist.distributed.collectives import all_sum, gather, rank, world_size
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.recipe import is_defined
from dlops_dist.metrics import confusion_counts, nearest_center_correct, rank_of_label, recall_at_1, unit_length

BLOCK = 256
"""Samples that are evaluated together. A rank owns whole blocks, so the blocks do not depend on the ranks."""


def evaluate(learner: Learner, reader: Reader, ids: Ids, with_confusion: bool = False) -> dict[str, Any]:
    """Figures of the model on some samples.

        loss               the run's loss, each block of 256 samples judged as a batch; None if it has no term
        top1, top5         of the head
        nearest_center     accuracy of the nearest of the classes' mean training embeddings
        recall_at_1        whether the nearest other embedding has the same label; None where no label is there twice
        top1_by_class      list (C,); None for a class without samples
        confusion          where wanted, list (C, C): how many samples of a class (row) were taken for which (column)

    Embeddings have length 1 where they are compared by their directions. Sums are float64, added in block order.
    """
    sums = device_sums(learner, reader, ids)
    totals = sums.rows.cpu().cumsum(dim=0)[-1].tolist()  # block by block
    confusion = sums.confusion.cpu()
    recalled = sums.recalled.item()

    numbers = np.bincount(reader.labels[ids], minlength=len(confusion)).tolist()
    terms = {name: totals[3 + 2 * i : 5 + 2 * i] for i, name in enumerate(learner.loss.weights)}
    losses = {name: total / count if count else None for name, (total, count) in terms.items()}
    for name, loss in learner.loss.of_all.items():
        if losses[name] is None and any(is_defined(loss, reader.labels[block]) for block in blocks(ids, BLOCK)):
            losses[name] = 0.0  # all far enough: none is counted by average active
    hits = confusion.diagonal().tolist()
    more = {"confusion": confusion.long().tolist()} if with_confusion else {}
    return {
        "loss": learner.loss.total(losses),
        **losses,
        "top1": totals[0] / len(ids),
        "top5": totals[1] / len(ids),
        "nearest_center": totals[2] / len(ids),
        "recall_at_1": recalled / len(ids) if max(numbers) > 1 else None,
        "top1_by_class": [h / n if n else None for h, n in zip(hits, numbers, strict=True)],
        **more,
    }


class DeviceSums(NamedTuple):
    """What an evaluation adds up, float64 on the device, equal on all ranks: looked at once, when all is done."""

    rows: Tensor
    """Of each block: hits of top-1, top-5 and the nearest centre, then sum and count of each loss."""
    confusion: Tensor
    """(C, C) samples of a class (row) that were taken for which (column)."""
    recalled: Tensor
    """Hits of Recall@1."""


@torch.no_grad()
def device_sums(learner: Learner, reader: Reader, ids: Ids) -> DeviceSums:
    """What `evaluate` makes its figures of. Nothing here waits for a GPU."""
    parts, mine = evaluated_blocks(ids)
    num_classes, num_losses = learner.inputs.num_classes, len(learner.loss.weights)
    rows = torch.zeros(len(parts), 3 + 2 * num_losses, dtype=torch.float64, device=learner.device)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.float64, device=learner.device)
    own = []
    for place, batch in enumerate(read_blocks(learner, reader, parts[mine]), mine.start):
        embeddings, logits = _judged(learner, batch.images)
        rows[place], judged = _block_row(learner, embeddings, logits, batch)
        confusion += confusion_counts(logits, batch.labels)
        own.append(judged)
    everyone = gather(torch.cat(own) if own else _no_embeddings(learner), _sizes(parts))
    return DeviceSums(
        all_sum(rows),  # the other ranks' rows are zero: exact
        all_sum(confusion),
        _count_recalled(everyone, on_device(reader.labels[ids], learner.device)),
    )


class Evaluated(Protocol):
    """What reading blocks needs of a learner."""

    settings: Any
    device: torch.device


def evaluated_blocks(ids: Ids) -> tuple[list[Ids], slice]:
    """The blocks in which samples are evaluated, and which of them are this rank's."""
    parts = blocks(ids, BLOCK)
    return parts, rank_part(len(parts), rank(), world_size())


def read_blocks(learner: Evaluated, reader: Reader, parts: list[Ids]) -> Iterator[Batch]:
    data = learner.settings.data
    whole = ((block, slice(0, len(block))) for block in parts)
    return read_ahead(reader, whole, learner.device, data.threads, data.prefetch)


def _judged(learner: Learner, images: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings and logits of a block. One shape for all blocks costs one compilation."""
    missing = BLOCK - len(images) if learner.compiled else 0
    padded = torch.cat([images, images.new_zeros(missing, *images.shape[1:])]) if missing else images
    embeddings, logits = learner.judge(padded)
    return embeddings[: len(images)], logits[: len(images)]


def _block_row(learner: Learner, embeddings: Tensor, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of one block: counts of hits with sum and count of each loss; the embeddings as they are compared."""
    labels = batch.labels
    everyone = {"embeddings": embeddings, "logits": logits}
    terms = learner.loss.own_terms(embeddings, logits, labels)
    terms |= learner.loss.all_terms(everyone, labels, slice(None), batch.host_labels)
    centers = learner.class_means
    if learner.directions:
        embeddings, centers = unit_length(embeddings), unit_length(centers)
    place = rank_of_label(logits, labels)
    nearest = nearest_center_correct(embeddings, labels, centers)
    figures: list[int | Tensor] = [(place < 1).sum(), (place < 5).sum(), nearest.sum()]
    figures += [f for name in learner.loss.weights for f in (terms[name].sum, terms[name].count)]
    row = [f.double() if isinstance(f, Tensor) else place.new_full((), f, dtype=torch.float64) for f in figures]
    return torch.stack(row), embeddings


def _no_embeddings(learner: Learner) -> Tensor:
    return torch.empty(0, learner.model.embedding_dim, device=learner.device, dtype=learner.dtype)


def _count_recalled(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Recall@1 hits over all queries, float64; each rank asks for whole blocks of them."""
    parts, mine = evaluated_blocks(np.arange(len(labels)))
    own = torch.zeros((), dtype=torch.float64, device=labels.device)
    for block in parts[mine]:
        own += recall_at_1(embeddings, labels, slice(block[0], block[-1] + 1)).sum()
    return all_sum(own)


def _sizes(parts: list[Ids]) -> list[int]:
    """How many samples each rank's blocks hold."""
    own = (rank_part(len(parts), r, world_size()) for r in range(world_size()))
    return [sum(map(len, parts[blocks_of])) for blocks_of in own]
