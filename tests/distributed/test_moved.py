"""The state that losses keep of whole batches, moved by all ranks' samples in the one order that they have."""

import pytest
import torch
from kept_ranks import on_ranks

from dlops_dist.distributed.tree import Blocks, TreeSum
from dlops_dist.engine.gathered import Everyone, Layout
from dlops_dist.engine.moved import flat, move, summed
from dlops_dist.losses import CenterLoss

VIEWS, BLOCKS = 2, 5


def centers_after(x, labels, lengths, num_classes):
    """Of a step of some micro-batches, on this rank."""
    loss, blocks = CenterLoss(num_classes, x.shape[1]).double(), Blocks(BLOCKS)
    layout = Layout(blocks, lengths, VIEWS)
    everyone = Everyone(layout, labels)

    def of_block(rows, block):
        parts = [blocks.part(length // VIEWS, block) for length in lengths]
        batches = zip(rows.split(lengths), parts, strict=True)
        return torch.cat([batch[VIEWS * part.start : VIEWS * part.stop] for batch, part in batches])

    outputs = [{"embeddings": of_block(x, block)} for block in blocks.own]
    sums = [
        summed([loss], own, of_block(labels, block), len(labels))
        for own, block in zip(outputs, blocks.own, strict=True)
    ]  # fmt: skip
    total = []
    for place, like in enumerate(flat(sums[0])):
        added = TreeSum(blocks)
        for block, own in zip(blocks.own, sums, strict=True):
            added.add(block, flat(own)[place].flatten().clone())
        total.append(added.total().view_as(like))
    move([loss], total, sums[0], outputs, everyone)
    own = torch.cat([rows["embeddings"] for rows in outputs])
    places = [layout.place(place, batch) for place in range(len(blocks.own)) for batch in range(len(lengths))]
    assert torch.equal(torch.cat([own[place] for place in places]), own)
    rows = everyone.of("embeddings", [rows["embeddings"] for rows in outputs])
    assert torch.equal(layout.by_batch(rows), x)
    assert torch.equal(layout.by_block(x), rows)
    return loss.centers


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[14], [8, 14, 6]], ids=["a batch", "micro-batches"])
@pytest.mark.parametrize("num_classes", [4, 1000], ids=["by sums", "by samples"])
def test_centres_move_by_all_ranks_samples(ranks, lengths, num_classes):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(lengths), 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_classes, (sum(lengths),), generator=generator)
    expected = torch.zeros(num_classes, 5, dtype=torch.float64)
    for label in set(labels.tolist()):  # from 0: c <- 0.5 sum of x / (1 + n)
        own = [row for row, other in zip(x, labels.tolist(), strict=True) if other == label]
        expected[label] = 0.5 * sum(own) / (1 + len(own))
    centers = on_ranks(centers_after, ranks, x, labels, lengths, num_classes)
    torch.testing.assert_close(centers[0], expected, rtol=1e-13, atol=1e-15)
    assert all(torch.equal(c, centers[0]) for c in centers)
