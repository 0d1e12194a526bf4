"""Exact evaluation: every sample once, the same figures for any number of workers."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dlops_dist.data.loader import Batch, read_ahead
from dlops_dist.data.order import Ids, blocks, rank_part
from dlops_dist.data.readers import Reader, on_device
from dlops_dist.distributed.collectives import all_sum, gather, rank, world_size
from dlops_dist.engine.learner import BLOCK, Learner
from dlops_dist.engine.losses import is_defined
from dlops_dist.engine.mined import Outputs
from dlops_dist.engine.step import Step
from dlops_dist.errors import RunError
from dlops_dist.losses import Terms
from dlops_dist.metrics import (
    Judged,
    Metric,
    Points,
    add_confusion,
    centers_of,
    class_hits,
    map_at_r,
    nearest_center,
    recall_at,
    top_k,
    unit_length,
)

OF_A_HEAD: dict[str, Metric] = {
    "top1": top_k(1), "top5": top_k(5), "nearest_center": nearest_center, "recall_at_1": recall_at(1),
}  # fmt: skip
OF_OPEN_SETS: dict[str, Metric] = {"recall_at_1": recall_at(1), "map_at_r": map_at_r()}
"""Of classes that training never saw."""


def evaluate(learner: Learner, reader: Reader, ids: Ids, with_confusion: bool = False) -> dict[str, Any]:
    """Figures of the model on some samples.

        loss               the run's loss, each block of 256 samples judged as a batch; None if it has no term
        top1, top5         of the head
        nearest_center     accuracy of the nearest of the classes' mean training embeddings
        recall_at_1        whether the nearest other embedding has the same label; None where no label is there twice
        top1_by_class      list (C,); None for a class without samples
        confusion          where wanted, list (C, C): how many samples of a class (row) were taken for which (column)

    and the metrics of the recipe. Of an open set, whose classes training never saw, retrieval alone is judged:
    recall_at_1, map_at_r, and the recipe's. Embeddings have length 1 where they are compared by their directions. Sums
    are float64, added in block order.
    """
    seen = ~learner.class_means.isnan().any(dim=1).cpu().numpy()
    is_open = bool(seen.any() and not seen[reader.labels[ids]].any())
    metrics = {**(OF_OPEN_SETS if is_open else OF_A_HEAD), **learner.metrics}
    sums = device_sums(learner, reader, ids, metrics, with_losses=not is_open, with_confusion=with_confusion)
    figures = figures_of_sums(learner, reader, ids, metrics, sums)
    if is_open:
        return {"loss": None} | {name: figures[name] for name in metrics}
    classified = sums.classified.cpu()
    numbers = np.bincount(reader.labels[ids], minlength=len(classified)).tolist()
    hits = (classified.diagonal() if with_confusion else classified).tolist()
    by_class = [h / n if n else None for h, n in zip(hits, numbers, strict=True)]
    return {**figures, "top1_by_class": by_class} | (
        {"confusion": classified.long().tolist()} if with_confusion else {}
    )


class DeviceSums(NamedTuple):
    """What an evaluation adds up, float64 on the device, equal on all ranks: looked at once, when all is done."""

    rows: Tensor
    """Of each block: sum and count of each loss, then the sum of each metric."""
    classified: Tensor
    """(C,) samples of each class that were taken for it; where that is wanted, (C, C) those of a class (row) that were
    taken for which (column); (0,) where nothing is classified."""


def figures_of_sums(
    learner: Step, reader: Reader, ids: Ids, metrics: Mapping[str, Metric], sums: DeviceSums
) -> dict[str, float | None]:
    """The means."""
    names = list(learner.loss.weights)
    totals = sums.rows.cpu().cumsum(dim=0)[-1].tolist()  # block by block
    terms = {name: totals[2 * i : 2 * i + 2] for i, name in enumerate(names)}
    losses = {name: total / count if count else None for name, (total, count) in terms.items()}
    for name, loss in learner.loss.of_all.items():
        if losses[name] is None and any(is_defined(loss, reader.labels[block]) for block in blocks(ids, BLOCK)):
            losses[name] = 0.0  # all far enough: none is counted by average active
    has_pairs = not metrics or np.unique(reader.labels[ids], return_counts=True)[1].max() > 1
    means = {name: total / len(ids) for name, total in zip(metrics, totals[2 * len(names) :], strict=True)}
    return {
        "loss": learner.loss.total(losses),
        **losses,
        **{name: mean if has_pairs or sees_own(metrics[name]) else None for name, mean in means.items()},
    }


@torch.no_grad()
def device_sums(
    learner: Step, reader: Reader, ids: Ids, metrics: Mapping[str, Metric] = OF_A_HEAD, with_losses: bool = True,
    with_confusion: bool = False,
) -> DeviceSums:  # fmt: skip
    """What figures are made of. Nothing here waits for a GPU."""
    parts, mine = evaluated_blocks(ids)
    num_losses = len(learner.loss.weights)
    rows = torch.zeros(len(parts), 2 * num_losses + len(metrics), dtype=torch.float64, device=learner.device)
    num_classes = learner.inputs.num_classes if metrics else 0
    shape = (num_classes, num_classes) if with_confusion else (num_classes,)
    classified = torch.zeros(shape, dtype=torch.float64, device=learner.device)
    means = _means(learner) if isinstance(learner, Learner) and metrics else None
    centers = centers_of(means) if means is not None and nearest_center in metrics.values() else None

    def judged_block(_: Any, given: tuple[int, Batch]) -> Judged | None:
        place, batch = given
        outputs, targets = learner.judged(batch)
        if with_losses:
            rows[place, : 2 * num_losses] = _flat_terms(learner, outputs, targets, batch)
        if not isinstance(learner, Learner) or not metrics:
            return None
        judged = judged_alone(learner, outputs, batch.labels, means)._replace(centers=centers)
        for i, (name, metric) in enumerate(metrics.items(), 2 * num_losses):
            if sees_own(metric):
                rows[place, i] = _summed(name, metric, judged)
        return judged

    own: list[Tensor] = []
    read = enumerate(read_blocks(learner, reader, parts[mine]), mine.start)
    while together := list(islice(read, len(learner.lanes))):
        for judged in filter(None, learner.lanes.map(judged_block, together)):
            if with_confusion:
                add_confusion(classified, judged.logits, judged.labels)
            else:
                classified += class_hits(judged.logits, judged.labels)
            own.append(judged.embeddings)
    if isinstance(learner, Learner) and not all(map(sees_own, metrics.values())):
        everyone = gather(torch.cat(own) if own else _no_embeddings(learner), _sizes(parts))
        _add_retrieval(learner, rows, metrics, everyone, reader.labels[ids].astype(np.int64), parts, mine)
    total = all_sum(torch.cat([rows.flatten(), classified.flatten()]))  # the other ranks' rows are zero: exact
    return DeviceSums(total[: rows.numel()].view_as(rows), total[rows.numel() :].view_as(classified))


def sees_own(metric: Metric) -> bool:
    return getattr(metric, "sees", "own") == "own"


def _flat_terms(learner: Step, outputs: Outputs, targets: Tensor, batch: Batch) -> Tensor:
    """Sum and count of each loss of a block."""
    loss = learner.loss
    terms: dict[str, Terms] = loss.own_terms(outputs, targets)
    terms |= loss.all_terms(outputs, batch.labels, slice(None), batch.host_labels)
    values: list[int | Tensor] = [value for name in loss.weights for value in (terms[name].sum, terms[name].count)]
    like = terms[next(iter(loss.weights))].sum
    return torch.stack([
        v.double() if isinstance(v, Tensor) else like.new_full((), v, dtype=torch.float64) for v in values
    ])  # fmt: skip


def judged_alone(learner: Learner, outputs: Outputs, labels: Tensor, means: Tensor | None = None) -> Judged:
    """A block as a metric sees it that knows of no other.

    Args:
        means: those of the learner's classes as they are compared, where they are at hand.
    """
    x, means = _compared(learner, outputs["embeddings"]), _means(learner) if means is None else means
    return Judged(x, labels, outputs["logits"], means, x, labels, slice(0, len(labels)), len(labels))


def _means(learner: Learner) -> Tensor:
    return _compared(learner, learner.class_means)


def _compared(learner: Learner, embeddings: Tensor) -> Tensor:
    return unit_length(embeddings) if learner.directions else embeddings


def _add_retrieval(
    learner: Learner, rows: Tensor, metrics: Mapping[str, Metric], everyone: Tensor, host_labels: np.ndarray,
    parts: Sequence[Ids], mine: slice,
) -> None:  # fmt: skip
    """Sums of the metrics that see all samples, for this rank's blocks."""
    labels, means = on_device(host_labels, learner.device), _means(learner)
    largest, end = int(np.bincount(host_labels).max()), sum(map(len, parts[: mine.start]))
    points = Points(everyone)
    for row in range(mine.start, mine.stop):
        start, end = end, end + len(parts[row])
        x, place = everyone[start:end], slice(start, end)
        judged = Judged(x, labels[place], x[:, :0], means, everyone, labels, place, largest, points=points)
        for i, (name, metric) in enumerate(metrics.items(), 2 * len(learner.loss.weights)):
            if not sees_own(metric):
                rows[row, i] = _summed(name, metric, judged)


def _summed(name: str, metric: Metric, judged: Judged) -> Tensor:
    values = metric(judged)
    if values.shape != judged.labels.shape:
        raise RunError(f"metrics[{name!r}] gave {tuple(values.shape)} numbers of {len(judged.labels)} samples")
    return values.double().sum()


def evaluated_blocks(ids: Ids) -> tuple[list[Ids], slice]:
    """The blocks in which samples are evaluated, and which of them are this rank's."""
    parts = blocks(ids, BLOCK)
    return parts, rank_part(len(parts), rank(), world_size())


def read_blocks(learner: Step, reader: Reader, parts: Sequence[Ids]) -> Iterator[Batch]:
    data = learner.settings.data
    whole = ((block, slice(0, len(block))) for block in parts)
    return read_ahead(reader, whole, learner.device, data.threads, data.prefetch)


def _no_embeddings(learner: Learner) -> Tensor:
    return torch.empty(0, learner.model.embedding_dim, device=learner.device, dtype=learner.dtype)


def _sizes(parts: list[Ids]) -> list[int]:
    """How many samples each rank's blocks hold."""
    own = (rank_part(len(parts), r, world_size()) for r in range(world_size()))
    return [sum(map(len, parts[blocks_of])) for blocks_of in own]
