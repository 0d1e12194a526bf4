"""A user's model is exact, or refused by the name of what is not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlops_dist.distributed.exact import Embedder, KeyedDropout, exact, inexact_allowed
from dlops_dist.distributed.norm import BlockBatchNorm2d, SyncBatchNorm2d
from dlops_dist.errors import RunError

IMAGES = torch.rand(4, 3, 8, 8, dtype=torch.float64)


class Flat(nn.Module):
    """What a user's module does to flattened images."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(self, x.flatten(1))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return x.flatten(1)


@pytest.mark.parametrize(
    ("inside", "words"),
    [
        (Flat(lambda self, x: x + torch.rand_like(x)), "module inside changes with torch's random state"),
        (Flat(lambda self, x: F.dropout(x, 0.5, self.training)), "module inside changes with torch's random state"),
        (Flat(lambda self, x: x - x.mean(dim=0)), "module inside depends on which other samples are in the batch"),
        (Flat(lambda self, x: F.batch_norm(x, None, None, training=True)), "inside depends on which other samples"),
        (Counting(), "buffer inside.seen changes in training"),
    ],
)
def test_what_is_not_exact_is_refused_by_name(inside, words, user_error):
    model = nn.Sequential()
    model.add_module("inside", inside)
    with user_error(words):
        exact(model, IMAGES, 192)
    with inexact_allowed(True) as notes:
        assert exact(model, IMAGES, 192) is model
    assert any(words in note for note in notes)
    with inexact_allowed(False), user_error(words):
        exact(model, IMAGES, 192)


def test_features_of_another_shape_are_refused(user_error):
    with user_error("the model gives (4, 192) of (4, 3, 8, 8) images, not (4, 10)"):
        exact(nn.Flatten(), IMAGES, 10)
    with user_error("must give a tensor (N, D) of images, not a dict"):
        exact(Flat(lambda self, x: {"features": x}), IMAGES, 192)


def test_one_dropout_in_two_places_is_refused(user_error):
    dropout = nn.Dropout(0.5)
    with user_error("module 1 drops twice in a pass"):
        exact(nn.Sequential(nn.Flatten(), dropout, nn.Linear(192, 192), dropout), IMAGES, 192)


@pytest.mark.parametrize(("over", "kind"), [("block", BlockBatchNorm2d), ("sync", SyncBatchNorm2d)])
def test_norms_are_ours_and_keep_their_state(over, kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Flatten())
    model(torch.rand(4, 3, 8, 8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    norm = exact(model, IMAGES, 144, over)[1]
    assert (type(norm), norm.momentum) == (kind, 0.3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dropped_units_are_those_of_the_draws():
    """Whatever else is in the batch; values one by one, channels together, samples together."""

    class StochasticDepth(nn.Module):
        p, mode = 0.5, "row"

    trunk = nn.Sequential(nn.Dropout2d(0.25), StochasticDepth(), nn.Flatten(), nn.Dropout(0.5))
    model = Embedder(trunk, 192, 5, (8, 8)).train()
    assert model.num_draws == 3 + 1 + 192
    images, draws = torch.rand(6, 3, 8, 8), torch.rand(6, 196)
    channels = (draws[:, :3] >= 0.25)[:, :, None, None] / 0.75
    row, values = (draws[:, 3:4] >= 0.5) / 0.5, (draws[:, 4:] >= 0.5) / 0.5
    torch.testing.assert_close(model.embed(images, draws), (images * channels).flatten(1) * row * values)
    assert torch.equal(model.embed(images[2:4], draws[2:4]), model.embed(images, draws)[2:4])
    with pytest.raises(RunError, match="must be an Embedder"):
        model.embed(images)
    assert torch.equal(model.eval().embed(images, draws), images.flatten(1))
    assert sum(isinstance(module, KeyedDropout) for module in model.modules()) == 3
