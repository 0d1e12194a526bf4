"""ResNet-18 against torchvision's, and its block against a loop of He et al. 2015, eq. 2."""

import math
from itertools import product

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from dlops_dist.models.resnet import BasicBlock, ResNet, resnet18


@pytest.fixture(scope="module")
def reference():
    """torchvision's ResNet-18 whose batch norms differ from the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchvision.models.resnet18(num_classes=7)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


@pytest.fixture
def loaded(reference):
    """Our ResNet-18 with the reference's weights."""
    model = resnet18(7, stem="imagenet")
    model.load_state_dict(reference.state_dict())
    return model


def images(num=3, size=64, seed=0):
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(seed))


def shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def test_names_and_shapes_are_those_of_torchvision(reference):
    assert shapes(resnet18(7, stem="imagenet").state_dict()) == shapes(reference.state_dict())


def test_the_cifar_stem_differs_in_the_first_convolution_alone(reference):
    ours, theirs = shapes(resnet18(7).state_dict()), shapes(reference.state_dict())
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == ["conv1.weight"]
    assert ours["conv1.weight"] == (64, 3, 3, 3)


def test_outputs_in_eval_mode_are_those_of_torchvision(reference, loaded):
    reference.eval()
    loaded.eval()
    with torch.no_grad():
        assert torch.equal(loaded(images()), reference(images()))


def test_outputs_gradients_and_statistics_in_train_mode_are_those_of_torchvision(reference, loaded):
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    reference.train()
    loaded.train()
    outputs = []
    for model in (loaded, reference):
        model.zero_grad()
        outputs.append(model(images()))
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    for (name, ours), theirs in zip(loaded.named_parameters(), reference.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-5 * theirs.grad.norm().item(), msg=name)
    for name, value in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert not torch.equal(before["bn1.running_mean"], reference.state_dict()["bn1.running_mean"])
    reference.load_state_dict(before)


def loop_convolution(x, weight, stride, padding):
    """Of one image x[channel][row][column], value by value."""
    size = len(x[0])
    k = len(weight[0][0])
    places = range(0, size + 2 * padding - k + 1, stride)
    inside = range(size)
    return [
        [
            [
                math.fsum(
                    kernel[c][i][j] * x[c][row + i - padding][column + j - padding]
                    for c, i, j in product(range(len(x)), range(k), range(k))
                    if row + i - padding in inside and column + j - padding in inside
                )
                for column in places
            ]
            for row in places
        ]
        for kernel in weight
    ]


@pytest.mark.parametrize(("in_channels", "channels", "stride"), [(2, 2, 1), (2, 3, 1), (2, 4, 2), (3, 3, 2)])
def test_a_block_equals_the_loop(in_channels, channels, stride):
    generator = torch.Generator().manual_seed(0)
    block = BasicBlock(in_channels, channels, stride, lambda _: nn.Identity()).double()
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    image = torch.randn(in_channels, 5, 5, generator=generator, dtype=torch.float64)

    x = image.tolist()
    hidden = loop_convolution(x, block.conv1.weight.tolist(), stride, 1)
    hidden = [[[max(value, 0.0) for value in row] for row in plane] for plane in hidden]
    y = torch.tensor(loop_convolution(hidden, block.conv2.weight.tolist(), 1, 1), dtype=torch.float64)
    projected = stride != 1 or in_channels != channels
    assert (block.downsample is not None) == projected
    shortcut = loop_convolution(x, block.downsample[0].weight.tolist(), stride, 0) if projected else x
    expected = (y + torch.tensor(shortcut, dtype=torch.float64)).clamp(min=0)
    assert_close(block(image[None])[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("stem", "sizes"), [("cifar", [32, 32, 32, 16, 8, 4]), ("imagenet", [16, 8, 8, 4, 2, 1])], ids=["cifar", "imagenet"]
)
def test_height_and_width_through_the_stages_at_32_pixels(stem, sizes):
    model = resnet18(4, stem, width=2)
    found = []
    for name in ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        getattr(model, name).register_forward_hook(lambda module, inputs, output: found.append(output.shape[2:]))
    model(images(size=32))
    assert found == [(size, size) for size in sizes]


@pytest.mark.parametrize("width", [2, 5])
def test_logits_are_the_head_of_embeddings_of_eight_widths(width):
    model = resnet18(6, width=width).eval()
    embeddings = model.embed(images(size=16))
    assert model.embedding_dim == 8 * width
    assert embeddings.shape == (3, 8 * width)
    assert torch.equal(model(images(size=16)), model.fc(embeddings))
    assert model.fc.out_features == 6


@pytest.mark.parametrize("size", [16, 20, 33])
def test_an_embedding_is_the_mean_over_the_places_of_the_last_stage(size):
    model = resnet18(6, width=2).eval()
    last = []
    model.layer4.register_forward_hook(lambda module, inputs, output: last.append(output))
    embeddings = model.embed(images(size=size))
    assert_close(embeddings, last[0].mean(dim=(2, 3)))


def test_embedding_norm_keeps_directions_and_sets_lengths():
    free, scaled = resnet18(6, width=4).eval(), resnet18(6, width=4, embedding_norm=8.0).eval()
    scaled.load_state_dict(free.state_dict())
    embeddings = scaled.embed(images(size=16))
    assert_close(embeddings.norm(dim=1), torch.full((3,), 8.0))
    assert_close(embeddings / 8, F.normalize(free.embed(images(size=16))))


def test_the_norm_layer_is_made_for_every_convolution():
    made = []

    def norm_layer(channels):
        made.append(channels)
        return nn.GroupNorm(1, channels)

    model = resnet18(6, width=2, norm_layer=norm_layer)
    assert sorted(made) == [2] * 5 + [4] * 5 + [8] * 5 + [16] * 5
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_blocks_are_counted_for_each_stage():
    model = ResNet((1, 2, 3, 1), num_classes=2, width=2)
    assert [len(getattr(model, f"layer{stage}")) for stage in (1, 2, 3, 4)] == [1, 2, 3, 1]
    assert model(images(size=16)).shape == (3, 2)


def test_convolutions_start_with_the_variance_that_relu_keeps():
    torch.manual_seed(0)
    for module in resnet18(2, width=32).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)


def test_an_unknown_stem_is_named():
    with pytest.raises(ValueError, match="stem"):
        resnet18(2, stem="small")
