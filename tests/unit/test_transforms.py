"""A recipe's own changes of images: each sample's are its own, whoever computes them, and in whatever batch."""

import random

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from dlops_dist.data.draws import uniform
from dlops_dist.data.keys import key
from dlops_dist.data.transforms import Keyed, transformed
from dlops_dist.errors import RunError

IDS = torch.tensor([3, 8, 1, 5, 9, 4])


def images():
    return torch.randint(256, (6, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def three_states(image):
    """Draws from each random state that a transform may use."""
    numbers = [torch.rand(()).item(), random.random(), np.random.rand()]
    return torch.tensor([255 * n for n in numbers]).to(torch.uint8)[:, None, None].expand_as(image)


CHANGES = {
    "randaugment": v2.RandAugment(),
    "several": v2.Compose([v2.RandomResizedCrop(8, antialias=True), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4)]),
    "three states": three_states,
    "keyed": Keyed(lambda x, draws: (x * draws[:, :1, None, None]).to(torch.uint8), 2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_sample_is_changed_alike_in_any_batch(name):
    change, x = CHANGES[name], images()
    whole = transformed(change, x, IDS, 7, 2)
    assert not torch.equal(whole, x)
    order = torch.tensor([4, 0, 5])
    assert torch.equal(transformed(change, x[order], IDS[order], 7, 2), whole[order])
    assert transformed(change, x[:0], IDS[:0], 7, 2).shape == (0, 8, 8, 3)
    for seed, epoch in ((8, 2), (7, 3)):
        assert not torch.equal(transformed(change, x, IDS, seed, epoch), whole)


def test_a_function_is_given_the_numbers_of_its_samples():
    seen = []
    transformed(Keyed(lambda x, draws: seen.append(draws) or x, 3), images(), IDS, 7, 2)
    assert torch.equal(seen[0], uniform(key(7, 2, "transform"), IDS, 3))


def test_the_random_states_of_others_go_on_as_if_nothing_had_been_drawn():
    def states():
        return torch.rand(2).tolist(), random.random(), np.random.rand()

    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = states()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    transformed(three_states, images(), IDS, 0, 0)
    assert states() == expected


@pytest.mark.parametrize(
    ("change", "given"),
    [
        (v2.ToDtype(torch.float32, scale=True), "torch.float32 (3, 8, 8)"),
        (v2.Resize(4, antialias=True), "torch.uint8 (3, 4, 4)"),
        (lambda image: None, "NoneType"),
        (Keyed(lambda x, draws: x.float(), 1), "torch.float32 (6, 8, 8, 3)"),
        (Keyed(lambda x, draws: x[:3], 1), "torch.uint8 (3, 8, 8, 3)"),
    ],
)
def test_what_changes_type_or_size_is_refused(change, given):
    with pytest.raises(RunError, match="augment gave ") as refused:
        transformed(change, images(), IDS, 0, 0)
    assert given in str(refused.value)
