"""Autoencoders against naive loops, torch's own modules and finite differences."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlops_dist.losses import ReconstructionLoss
from dlops_dist.models.autoencoder import Autoencoder, StackedAutoencoder, StackedAutoencoderClassifier

STUDY = (1024, 1000, 500, 256, 128, 64)


def stack(layers=(7, 5, 3), norm_layer=None, tied=False, num_inputs=12):
    torch.manual_seed(0)
    return StackedAutoencoder(num_inputs, layers, norm_layer, tied).double()


def images(n=6):
    return torch.randn(n, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def naive(x, weight, bias):
    """W x + b, sum by sum."""
    rows = list(zip(weight, bias, strict=True))
    sums = [[sum((w * v for w, v in zip(row, sample, strict=True)), b) for row, b in rows] for sample in x]
    return torch.stack([torch.stack(of_sample) for of_sample in sums])


@pytest.mark.parametrize("tied", [False, True])
def test_an_autoencoder_is_its_equations(tied):
    torch.manual_seed(0)
    layer = Autoencoder(4, 3, tied=tied).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    weight, bias = layer.encoder[0].weight, layer.encoder[0].bias
    if not tied:
        nn.init.normal_(layer.decoder.weight)
    nn.init.normal_(layer.decoder.bias)
    back = weight.t() if tied else layer.decoder.weight
    code = naive(x, weight, bias).clamp(min=0)
    torch.testing.assert_close(layer.encoder(x), code)
    torch.testing.assert_close(layer(x), naive(code, back, layer.decoder.bias))


def test_a_tied_decoder_has_no_weight_of_its_own_and_its_gradient_reaches_the_encoder_from_both_sides():
    layer = Autoencoder(4, 3, tied=True).double()
    assert [name for name, _ in layer.named_parameters()] == ["encoder.0.weight", "encoder.0.bias", "decoder.bias"]
    free = Autoencoder(4, 3).double()
    free.encoder.load_state_dict(layer.encoder.state_dict())
    free.decoder.weight.data.copy_(layer.encoder[0].weight.t())
    x = torch.randn(5, 4, dtype=torch.float64)
    for model in (layer, free):
        ReconstructionLoss()(model(x), x).backward()
    both = free.encoder[0].weight.grad + free.decoder.weight.grad.t()
    torch.testing.assert_close(layer.encoder[0].weight.grad, both)
    assert free.decoder.weight.grad.abs().max() > 0


def test_an_untied_decoder_starts_as_the_transpose_and_then_goes_its_own_way():
    layer = Autoencoder(4, 3)
    assert torch.equal(layer.decoder.weight, layer.encoder[0].weight.t())
    layer.decoder.weight.data.zero_()
    assert layer.encoder[0].weight.abs().min() > 0


@pytest.mark.parametrize("norm_layer", [None, nn.LayerNorm, nn.BatchNorm1d])
@pytest.mark.parametrize("tied", [False, True])
def test_the_gradients_are_those_of_finite_differences(norm_layer, tied):
    model = stack(norm_layer=norm_layer, tied=tied)
    x = torch.randn(8, 12, dtype=torch.float64)
    for parameter in model.parameters():  # a decoder's bias of 0 would lie on the kink of a ReLU
        nn.init.normal_(parameter, std=0.5)
    names, values = zip(*((n, p.detach().clone().requires_grad_()) for n, p in model.named_parameters()), strict=True)

    def loss(*values):
        return ReconstructionLoss()(torch.func.functional_call(model, dict(zip(names, values, strict=True)), x), x)

    assert torch.autograd.gradcheck(loss, values)


def test_the_unrolled_stack_goes_up_and_down_with_no_negative_code_on_the_way():
    model = stack()
    x = torch.randn(6, 12, dtype=torch.float64)
    codes = [x]
    for layer in model:
        codes.append(F.relu(F.linear(codes[-1], layer.encoder[0].weight, layer.encoder[0].bias)))
    down = codes[-1]
    for level in (2, 1, 0):
        down = F.linear(down, model[level].decoder.weight, model[level].decoder.bias)
        down = down.clamp(min=0) if level else down
    torch.testing.assert_close(model(x), down)
    for depth, code in enumerate(codes):
        torch.testing.assert_close(model.encode(x, depth), code)
    assert (down < 0).any(), "pixels may be negative"


def test_the_reconstruction_loss_is_the_mean_over_samples_and_inputs():
    ours, x = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    terms = ReconstructionLoss().terms(ours, x)
    assert terms.count == 35
    expected = sum((a - b) ** 2 for a, b in zip(ours.flatten().tolist(), x.flatten().tolist(), strict=True))
    assert terms.sum.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(ReconstructionLoss()(ours, x), F.mse_loss(ours, x))
    empty = ReconstructionLoss().terms(ours[:0], x[:0])
    assert (empty.sum.item(), empty.count, empty.mean().item()) == (0, 0, 0)
    assert ReconstructionLoss().terms(ours.bfloat16(), x.bfloat16()).sum.dtype == torch.float32


def test_the_classifier_prints_as_the_study_does():
    text = str(StackedAutoencoderClassifier(StackedAutoencoder(27, STUDY).encoders, code_layer=128, num_classes=10))
    sizes = [27, *STUDY]
    for below, above in itertools.pairwise(sizes):
        assert f"Linear(in_features={below}, out_features={above}, bias=True)" in text
    assert "(fc): Linear(in_features=128, out_features=10, bias=True)" in text
    assert text.count("ReLU()") == 6
    assert "orm" not in text


def classifier(model, **options):
    torch.manual_seed(3)
    return StackedAutoencoderClassifier(copy.deepcopy(model.encoders), 5, 4, **options).double()


def test_the_classifier_reads_the_code_of_the_chosen_layer():
    model = stack()
    ours = classifier(model)
    x = images()
    code = model.encode(x.permute(0, 2, 3, 1).flatten(1), 2)
    torch.testing.assert_close(ours.embed(x), code)
    torch.testing.assert_close(ours(x), F.linear(code, ours.fc.weight, ours.fc.bias))
    assert ours.embedding_dim == 5


@pytest.mark.parametrize("finetune", [False, True])
def test_only_what_is_to_be_trained_gets_gradients(finetune):
    ours = classifier(stack(norm_layer=nn.BatchNorm1d), finetune=finetune).train()
    before = copy.deepcopy(ours.encoders.state_dict())
    F.cross_entropy(ours(images()), torch.tensor([0, 1, 2, 3, 0, 1])).backward()
    for name, parameter in ours.named_parameters():
        trained = name.startswith("fc") or (finetune and not name.startswith("encoders.2"))
        assert (parameter.grad is not None) == trained == parameter.requires_grad, name
    moved = [n for n, v in ours.encoders.state_dict().items() if not torch.equal(v, before[n])]
    assert bool(moved) == finetune, "a frozen code must not move its running statistics"


def test_dropout_drops_what_its_draws_say_and_scales_the_rest():
    ours = classifier(stack(), dropout=0.4)
    assert ours.num_draws == 7 + 5
    draws = torch.rand(6, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = images().permute(0, 2, 3, 1).flatten(1)
    for depth, part in enumerate((draws[:, :7], draws[:, 7:])):
        x = ours.encoders[depth](x)
        x = torch.where(part < 0.4, 0.0, x / 0.6)
    torch.testing.assert_close(ours.embed(images(), draws), x)
    torch.testing.assert_close(ours.embed(images()), classifier(stack()).embed(images()))
    assert classifier(stack()).num_draws == 0


def test_dropout_on_a_frozen_code_touches_the_code_alone():
    ours = classifier(stack(), dropout=0.4, finetune=False)
    assert ours.num_draws == 5
    draws = torch.tensor([[0.0, 0.39, 0.4, 0.9, 1.0]] * 6, dtype=torch.float64)
    kept = torch.tensor([0, 0, 1, 1, 1]) / 0.6
    torch.testing.assert_close(ours.embed(images(), draws), ours.embed(images()) * kept)


def test_a_norm_standardises_the_code_that_the_classifier_reads():
    ours = classifier(stack(), norm_layer=nn.BatchNorm1d).train()
    code = classifier(stack()).embed(images(64))
    torch.testing.assert_close(ours.embed(images(64)), F.batch_norm(code, None, None, training=True))
    torch.testing.assert_close(ours.norm.running_mean, 0.1 * code.mean(dim=0))


@pytest.mark.parametrize(("layers", "code_layer"), [((7, 5, 3), 4), ((5, 7, 5), 5)])
def test_a_code_layer_that_is_not_one_of_the_layers_is_refused(layers, code_layer):
    with pytest.raises(ValueError, match="code_layer must be the units of one encoder"):
        StackedAutoencoderClassifier(stack(layers).encoders, code_layer)


def test_an_impossible_dropout_is_refused():
    with pytest.raises(ValueError, match="dropout"):
        StackedAutoencoderClassifier(stack().encoders, 5, dropout=1.0)
