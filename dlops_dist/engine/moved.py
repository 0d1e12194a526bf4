"""The state that losses keep of whole batches, their centres say: moved once a step, to the same bits on every rank.

By sums of all classes, which travel with the gradients; where classes outnumber the batch, by its samples, so that the
bytes grow with the batch and not with the classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dlops_dist.engine.gathered import Everyone


def summed(losses: Sequence[Any], outputs: Mapping[str, Tensor], labels: Tensor, batch_size: int) -> list[Tensor]:
    """What a block says about the states that are moved by sums."""
    by_sums = (loss for loss in losses if _num_classes(loss) <= batch_size)
    return [part for loss in by_sums for part in loss.sums(outputs[loss.reads], labels)]


def move(
    losses: Sequence[Any], sums: Sequence[Tensor], outputs: Sequence[Mapping[str, Tensor]], everyone: Everyone
) -> None:
    """Move all states.

    Args:
        sums: of all blocks, as `summed` gives them.
        outputs: of each of this rank's blocks.
    """
    left, labels = iter(sums), everyone.layout.by_block(everyone.labels)
    for loss in losses:
        if _num_classes(loss) <= len(labels):
            like = loss.sums(outputs[0][loss.reads][:0], labels[:0])
            loss.update(type(like)(*(next(left).to(part.dtype) for part in like)))
            continue
        rows = everyone.of(loss.reads, [of_block[loss.reads] for of_block in outputs])
        if hasattr(loss, "move"):
            loss.move(rows, labels)
        else:
            loss.update(loss.sums(rows, labels))


def _num_classes(loss: Any) -> int:
    return max(map(len, loss.buffers()))
