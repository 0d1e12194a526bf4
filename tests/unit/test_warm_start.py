"""Runs that begin with weights from elsewhere, and with parts that stay as they are."""

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from dlops_dist.data.loader import Batch
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.samples import Inputs
from dlops_dist.engine.warm_start import fitting_weights, freeze
from dlops_dist.errors import UserError
from dlops_dist.recipes.q1 import Settings as Q1

INPUTS = Inputs(10, (0.5,) * 3, (0.2,) * 3, (32, 32))
CPU = torch.device("cpu")


def small():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def saved(tmp_path, weights):
    path = tmp_path / "weights.pt"
    torch.save(weights, path)
    return str(path)


@pytest.mark.parametrize("inside", [lambda w: w, lambda w: {"state_dict": w, "epoch": 3}, lambda w: {"model": w}])
@pytest.mark.parametrize("before", ["", "model.", "module.", "trunk."])
def test_weights_of_a_file_are_found_under_the_usual_names(inside, before, tmp_path):
    theirs, told = small(), []
    path = saved(tmp_path, inside({before + name: value for name, value in theirs.state_dict().items()}))
    found = fitting_weights(path, small(), told.append)
    assert told == []
    assert found.keys() == theirs.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in theirs.state_dict().items())


def test_weights_of_a_safetensors_file_are_read(tmp_path):
    from safetensors.torch import save_file

    theirs = small().state_dict()
    save_file(theirs, tmp_path / "weights.safetensors")
    found = fitting_weights(str(tmp_path / "weights.safetensors"), small(), print)
    assert all(torch.equal(found[name], value) for name, value in theirs.items())


def test_torchvisions_weights_fit_ours_and_what_does_not_is_named(tmp_path):
    theirs, told = resnet18(), []
    model = Learner(Q1(model={"stem": "imagenet"}), INPUTS, 1, CPU).model
    found = fitting_weights(saved(tmp_path, theirs.state_dict()), model, told.append)
    assert torch.equal(found["layer4.1.conv2.weight"], theirs.layer4[1].conv2.weight)
    assert len(told) == 1
    assert "2 weights have another shape: fc.bias 1000 there, 10 here, fc.weight 1000x512 there, 10x512 here" in told[0]


def test_weights_that_are_missing_or_left_over_are_named(tmp_path):
    theirs, told = small().state_dict(), []
    del theirs["2.bias"]
    fitting_weights(saved(tmp_path, theirs | {"extra": torch.ones(2)}), small(), told.append)
    assert "1 weights are not in it, and begin anew: 2.bias" in told[0]
    assert "1 weights are not in this model: extra" in told[1]


@pytest.mark.parametrize(
    ("content", "words"),
    [({"a": torch.ones(3)}, "none of its 1 weights fits"), ([1, 2], "no weights by name"), ({"a": 3}, "by name")],
)
def test_what_fits_nothing_is_refused(content, words, tmp_path):
    with pytest.raises(UserError, match=words):
        fitting_weights(saved(tmp_path, content), small(), print)


def test_what_is_no_file_of_weights_is_refused(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    for place, words in ((tmp_path / "text.pt", "no weights that can be read"), (tmp_path / "none", "no such run or")):
        with pytest.raises(UserError, match=words):
            fitting_weights(str(place), small(), print)


def test_a_part_that_is_not_there_cannot_be_frozen():
    with pytest.raises(UserError, match=r"freeze: the model has no part 7; it has 0, 1, 2"):
        freeze(small(), ["7"])


def test_a_model_of_which_all_is_frozen_is_refused():
    with pytest.raises(UserError, match="freeze: nothing of the model is left to train"):
        freeze(small(), ["0", "1", "2"])


def test_frozen_parts_keep_weights_and_statistics_while_others_learn():
    settings = Q1(
        model={"width": 8, "stem": "imagenet"}, freeze=("conv1", "bn1", "layer1", "layer2.0.bn1.weight"),
        optimizer={"warmup_epochs": 0}, ema_decay=0.5,
    )  # fmt: skip
    learner = Learner(settings, INPUTS, 10, CPU)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    images = torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8)
    for step in range(2):
        learner.judge(images)  # an evaluation in between
        learner.step([Batch(images, labels, labels, slice(0, 8), np.arange(8))], 0, step)
    after = learner.model.state_dict()
    frozen = [name for name in before if name.startswith(settings.freeze)]
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    moved = [name for name in before if name not in frozen and not torch.equal(after[name], before[name])]
    assert {"layer2.0.conv1.weight", "layer2.0.bn1.running_mean", "fc.weight"} <= set(moved)


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("part", ["conv1 bn1 layer1 layer2 layer3 layer4", "fc"])
def test_what_a_frozen_part_has_made_for_a_loss_of_its_own_is_not_back_propagated(part, size):
    """The head of a triplet loss is trained beside it, on embeddings that it does not change."""
    model = {"width": 8, "stem": "imagenet"}
    learner = Learner(
        Q1(loss="triplet", model=model, freeze=part.split(), optimizer={"warmup_epochs": 0}, blocks=1), INPUTS, 9, CPU
    )
    before = {name: value.clone() for name, value in learner.model.named_parameters()}
    images, ids = torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8), torch.arange(8)
    parts = [slice(i, i + size) for i in range(0, 8, size)]
    labels = ids % 2
    learner.step([Batch(images[p], ids[p], labels[p], slice(0, size), labels[p].numpy()) for p in parts], 0, 0)
    moved = {
        name.partition(".")[0] for name, value in learner.model.named_parameters() if not value.equal(before[name])
    }
    assert moved == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"} - set(part.split())


def test_a_run_begins_with_given_weights_its_average_too():
    learner = Learner(Q1(model={"width": 8, "stem": "imagenet"}, ema_decay=0.9), INPUTS, 10, CPU)
    learner.start_from({"fc.bias": torch.arange(10.0)})
    assert learner.model.fc.bias.tolist() == learner.ema.model.fc.bias.tolist() == list(range(10))
