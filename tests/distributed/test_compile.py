"""Under torch.compile: the gather and the batch norm over ranks give what they give without."""

import pytest
import torch
from kept_ranks import on_ranks
from torch import nn

from dlops_dist.distributed.collectives import all_sum, gather, rank
from dlops_dist.distributed.norm import SyncBatchNorm2d, give_norms_a_group
from dlops_dist.losses import TripletLoss


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), SyncBatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, images):
        return self.fc(self.norm(self.conv(images)).relu().mean(dim=(2, 3)))


def gradients(compiled):
    model = Network().double()
    give_norms_a_group(model)
    sizes, labels = [3, 5], torch.tensor([0, 1, 0, 1, 2, 2, 0, 1])
    part = slice(0, 3) if rank() == 0 else slice(3, 8)

    def loss_of(images):
        terms = TripletLoss().terms(gather(model(images), sizes), labels, part)
        return terms.sum

    images = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[part]
    for _ in range(2):
        (torch.compile(loss_of, backend="aot_eager") if compiled else loss_of)(images).backward()
    return [all_sum(p.grad) for p in model.parameters()], list(model.buffers())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2])
def test_compiled_is_as_without(ranks):
    expected = on_ranks(gradients, ranks, False)
    for compiled, plain in zip(on_ranks(gradients, ranks, True), expected, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-12, atol=1e-14)
