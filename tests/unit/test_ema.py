"""The average of weights that follows a training, against its formula; and what is evaluated by it."""

import numpy as np
import torch
from torch import nn

from dlops_dist.engine.ema import Ema
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.samples import Inputs
from dlops_dist.recipes.q1 import Settings as Q1


def test_weights_and_running_statistics_are_averaged_as_the_formula_says():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema = Ema(model, 0.7)
    expected = {name: value.clone().double() for name, value in model.state_dict().items()}
    for step in range(40):
        model(torch.randn(5, 3))
        with torch.no_grad():
            model[0].weight += torch.randn(2, 3)
        ema.update(step)
        kept = min(0.7, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            expected[name] = kept * expected[name] + (1 - kept) * value.double()
    averaged = ema.model.state_dict()
    assert averaged.pop("1.num_batches_tracked") == 40
    for name, value in averaged.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(averaged["0.weight"], model[0].weight)
    assert not any(p.requires_grad for p in ema.model.parameters())


def learner_with(**chosen):
    settings = Q1(model={"width": 8, "stem": "imagenet"}, **chosen)
    return Learner(settings, Inputs(4, (0.5,) * 3, (0.25,) * 3), 10, torch.device("cpu"))


def images(number):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (number, 32, 32, 3), dtype=np.uint8))


def test_images_are_judged_by_the_averaged_weights():
    learner = learner_with(ema_decay=0.9)
    before = learner.judge(images(6))[1]
    with torch.no_grad():
        learner.model.fc.bias += 1
    assert torch.equal(learner.judge(images(6))[1], before)
    learner.ema.update(10**6)
    torch.testing.assert_close(learner.judge(images(6))[1], before + 0.1)


def test_flip_test_is_the_mean_over_an_image_and_its_mirror_image():
    plain, flipped = learner_with(), learner_with(flip_test=True)
    pictures = images(6)
    both = [plain.judge(view) for view in (pictures, pictures.flip(2))]
    for ours, first, second in zip(flipped.judge(pictures), *both, strict=True):
        torch.testing.assert_close(ours, (first + second) / 2)
    for ours, theirs in zip(flipped.judge(pictures), flipped.judge(pictures.flip(2)), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(both[0][1], both[1][1])
