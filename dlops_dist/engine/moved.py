"""The state that losses keep of whole batches, their centres say: moved once a step, to the same bits on every rank.

By sums of all classes, which travel with the gradients; where classes outnumber the batch, by its samples, so that the
bytes grow with the batch and not with the classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dlops_dist.engine.gathered import Everyone

Sums = Sequence[tuple[Tensor, ...]]
"""Of each state that is moved by them, what its loss calls its sums."""


def summed(losses: Sequence[Any], outputs: Mapping[str, Tensor], labels: Tensor, batch_size: int) -> Sums:
    """What a block says about the states that are moved by sums."""
    return [loss.sums(outputs[loss.reads], labels) for loss in losses if _num_classes(loss) <= batch_size]


def flat(sums: Sums) -> list[Tensor]:
    return [part for of_loss in sums for part in of_loss]


def move(
    losses: Sequence[Any], total: Sequence[Tensor], like: Sums, outputs: Sequence[Mapping[str, Tensor]],
    everyone: Everyone,
) -> None:  # fmt: skip
    """Move all states.

    Args:
        total: the sums of all blocks, flat.
        like: those of one.
        outputs: of each of this rank's blocks.
    """
    left, kinds, labels = iter(total), iter(like), everyone.layout.by_block(everyone.labels)
    for loss in losses:
        if _num_classes(loss) <= len(labels):
            kind: Any = next(kinds)
            loss.update(type(kind)(*(next(left).to(part.dtype) for part in kind)))
            continue
        rows = everyone.of(loss.reads, [of_block[loss.reads] for of_block in outputs])
        if hasattr(loss, "move"):
            loss.move(rows, labels)
        else:
            loss.update(loss.sums(rows, labels))


def _num_classes(loss: Any) -> int:
    return max(map(len, loss.buffers()))
