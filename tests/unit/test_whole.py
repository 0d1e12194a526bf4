"""Anybody's loss of a whole batch: as it is on its own, and computed once for all blocks of a step."""

import numpy as np
import torch
from torch import nn

from dlops_dist.data.loader import Batch
from dlops_dist.distributed.norm import BlockBatchNorm2d
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.recipe import Recipe
from dlops_dist.engine.samples import Inputs
from dlops_dist.losses import CrossEntropyLoss, Whole
from dlops_dist.models.resnet import resnet18
from dlops_dist.recipes.q1 import Settings as Q1


class Pull(nn.Module):
    """A mean over pairs, with a weight of its own; it knows how often it was called."""

    def __init__(self):
        super().__init__()
        self.scale, self.calls = nn.Parameter(torch.tensor(0.5)), 0

    def forward(self, x, labels):
        self.calls += 1
        same = labels[:, None] == labels
        return (self.scale * (x[:, None] - x).square().sum(dim=2) * same).mean()


def test_blocks_of_anchors_add_up_to_the_loss_and_its_gradients():
    pull, labels = Pull(), torch.arange(9) % 3
    x = torch.randn(9, 4, requires_grad=True)
    expected = torch.autograd.grad(pull(x, labels), [x, pull.scale])
    whole = Whole(pull)
    shared = whole.shared(x, labels)
    pull.calls = 0
    terms = [whole.terms(x, labels, part, shared) for part in (slice(0, 4), slice(4, 5), slice(5, 9))]
    assert (pull.calls, [t.count for t in terms]) == (0, [4, 1, 4])
    total = sum(t.sum for t in terms) / 9
    torch.testing.assert_close(total, pull(x, labels))
    torch.testing.assert_close(torch.autograd.grad(total, [x, pull.scale]), expected)


def test_a_step_of_several_blocks_computes_it_once():
    settings = Q1(model={"width": 8, "stem": "imagenet"}, global_batch_size=12, blocks=4)
    pull, inputs = Pull(), Inputs(4, (0.5,) * 3, (0.25,) * 3)
    recipe = Recipe(
        resnet18(4, "imagenet", 8, BlockBatchNorm2d), {"ce": (1.0, CrossEntropyLoss()), "pull": (0.1, Whole(pull))}
    )
    learner = Learner(settings, inputs, 10, torch.device("cpu"), recipe)
    ids = torch.arange(12)
    images = torch.randint(256, (12, 32, 32, 3), dtype=torch.uint8)
    learner.step([Batch(images, ids, ids % 4, slice(0, 12), (np.arange(12) % 4))], 0, 0)
    assert (learner.blocks.number, pull.calls) == (4, 1)
    assert pull.scale.grad is not None
