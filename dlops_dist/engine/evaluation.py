"""Exact evaluation: every sample once, the same figures for any number of workers."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dlops_dist.data.loader import Batch, read_ahead
from dlops_dist.data.order import Ids, blocks, rank_part
from dlops_dist.data.readers import Reader
from dlops_dist.distributed.collectives import all_sum, gather, rank, world_size
from dlops_dist.engine.learner import Learner
from dlops_dist.metrics import confusion_counts, nearest_center_correct, rank_of_label, recall_at_1, unit_length

BLOCK = 256
"""Samples that are evaluated together. A rank owns whole blocks, so the blocks do not depend on the ranks."""


@torch.no_grad()
def evaluate(learner: Learner, reader: Reader, ids: Ids, with_confusion: bool = False) -> dict[str, Any]:
    """Figures of the model on some samples.

        loss               the run's loss; triplets are mined within each block of 256 samples
        top1, top5         of the head
        nearest_center     accuracy of the nearest of the classes' mean training embeddings
        recall_at_1        whether the nearest other embedding has the same label
        top1_by_class      list (C,); None for a class without samples
        confusion          where wanted, list (C, C): how many samples of a class (row) were taken for which (column)

    Embeddings have length 1 where the triplet loss normalises them. Sums are float64, added in block order.
    """
    parts, mine = evaluated_blocks(ids)
    own = [_block_result(learner, batch) for batch in read_blocks(learner, reader, parts[mine])]

    num_classes, num_losses = learner.inputs.num_classes, len(learner.loss.weights)
    rows = torch.zeros(len(parts), 3 + 2 * num_losses, dtype=torch.float64, device=learner.device)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.float64, device=learner.device)
    for place, (row, _, counts) in enumerate(own, mine.start):
        rows[place] = row
        confusion += counts
    totals = all_sum(rows).cumsum(dim=0)[-1].tolist()  # the other ranks' rows are zero: exact; then block by block
    confusion = all_sum(confusion).cpu()

    embeddings = torch.cat([e for _, e, _ in own]) if own else _no_embeddings(learner)
    labels = reader.labels[ids]
    recalled = _count_recalled(gather(embeddings), torch.from_numpy(labels).to(learner.device))

    numbers = torch.from_numpy(np.bincount(labels, minlength=num_classes))
    losses = {name: totals[3 + 2 * i] / max(totals[4 + 2 * i], 1) for i, name in enumerate(learner.loss.weights)}
    hits = confusion.diagonal().tolist()
    more = {"confusion": confusion.long().tolist()} if with_confusion else {}
    return {
        "loss": learner.loss.total(losses),
        **losses,
        "top1": totals[0] / len(ids),
        "top5": totals[1] / len(ids),
        "nearest_center": totals[2] / len(ids),
        "recall_at_1": recalled / len(ids),
        "top1_by_class": [h / n if n else None for h, n in zip(hits, numbers.tolist(), strict=True)],
        **more,
    }


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


def _block_result(learner: Learner, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Of one block: counts of hits with sum and count of each loss, the embeddings, the confusion."""
    embeddings, logits = learner.judge(batch.images)
    labels = batch.labels
    terms = learner.loss.terms(embeddings, logits, embeddings, labels, slice(0, len(labels)))
    centers = learner.class_means
    if learner.loss.unit_length:
        embeddings, centers = unit_length(embeddings), unit_length(centers)
    place = rank_of_label(logits, labels)
    nearest = nearest_center_correct(embeddings, labels, centers)
    figures: list[int | Tensor] = [(place < 1).sum(), (place < 5).sum(), nearest.sum()]
    figures += [f for name in learner.loss.weights for f in (terms[name].sum, terms[name].count)]
    row = torch.stack([torch.as_tensor(f, dtype=torch.float64, device=learner.device) for f in figures])
    return row, embeddings, confusion_counts(logits, labels)


def _no_embeddings(learner: Learner) -> Tensor:
    return torch.empty(0, learner.model.embedding_dim, device=learner.device, dtype=learner.dtype)


def _count_recalled(embeddings: Tensor, labels: Tensor) -> float:
    """Recall@1 hits over all queries; each rank asks for whole blocks of them."""
    parts, mine = evaluated_blocks(np.arange(len(labels)))
    queries = (slice(block[0], block[-1] + 1) for block in parts[mine])
    own = sum(int(recall_at_1(embeddings, labels, block).sum()) for block in queries)
    return all_sum(torch.tensor(float(own), device=labels.device)).item()
