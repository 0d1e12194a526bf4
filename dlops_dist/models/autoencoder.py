"""Stacked autoencoders, and a classifier on their code (Hinton & Salakhutdinov 2006; Vincent et al. 2010)."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NormLayer = Callable[[int], nn.Module]


class Autoencoder(nn.Module):
    """One layer: a code h (N, K) of x (N, D), and x again from the code.

        h = relu(norm(W x + b)),    x' = V h + c

    V starts as W^T, c as 0. (With torch's usual V, some thousand times larger, no learning rate would suit both the
    encoder and the decoder.)

    Args:
        norm_layer: makes the normalisation of so many units; none by default.
        tied: decode by the encoder's own weights.
    """

    def __init__(
        self, num_inputs: int, num_units: int, norm_layer: NormLayer | None = None, tied: bool = False
    ) -> None:
        super().__init__()
        norms = [] if norm_layer is None else [norm_layer(num_units)]
        linear = nn.Linear(num_inputs, num_units, bias=not norms)  # a norm brings its own
        self.encoder = nn.Sequential(linear, *norms, nn.ReLU())
        self.decoder = _Tied(num_inputs) if tied else nn.Linear(num_units, num_inputs)
        if isinstance(self.decoder, nn.Linear):
            with torch.no_grad():
                self.decoder.weight.copy_(cast(nn.Linear, self.encoder[0]).weight.t())
                self.decoder.bias.zero_()

    def decode(self, code: Tensor) -> Tensor:
        """x' (N, D) of a code (N, K)."""
        if isinstance(self.decoder, _Tied):
            return F.linear(code, cast(nn.Linear, self.encoder[0]).weight.t(), self.decoder.bias)
        return self.decoder(code)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encoder(x))


class _Tied(nn.Module):
    """What a tied decoder has of its own: the bias c."""

    def __init__(self, num_inputs: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_inputs))


class StackedAutoencoder(nn.ModuleList):
    """Autoencoders, each on the codes of the one below; the first on flattened images (N, H, W, C) -> (N, D).

    `forward` is the unrolled network: up through all encoders, down through all decoders. Codes are never negative,
    so a decoded one has its negative values set to 0 before it is decoded further: that can only bring it nearer.
    """

    def __init__(
        self, num_inputs: int, layers: Sequence[int], norm_layer: NormLayer | None = None, tied: bool = False
    ) -> None:
        below = [num_inputs, *layers[:-1]]
        super().__init__(Autoencoder(*sizes, norm_layer, tied) for sizes in zip(below, layers, strict=True))

    @property
    def encoders(self) -> list[nn.Module]:
        return [cast(Autoencoder, layer).encoder for layer in self]

    def encode(self, x: Tensor, depth: int) -> Tensor:
        """The code of the depth-th layer, counted from 1; x itself at depth 0."""
        for encoder in self.encoders[:depth]:
            x = encoder(x)
        return x

    def decode(self, code: Tensor, depth: int) -> Tensor:
        """Inputs (N, D) from a code of the depth-th layer."""
        for level in reversed(range(depth)):
            code = cast(Autoencoder, self[level]).decode(code)
            code = code.relu() if level else code
        return code

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x, len(self)), len(self))


class StackedAutoencoderClassifier(nn.Module):
    """A linear classifier on the code of pretrained encoders.

    Args:
        encoders: from the pixels up; those above the code are kept and not used.
        code_layer: the classifier reads the code of the encoder with so many units.
        dropout: part of the units dropped in training.
        finetune: train the encoders too; else they stay as they are, in evaluation mode.
        norm_layer: standardises the code that the classifier reads; none by default.
    """

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        code_layer: int = 128,
        num_classes: int = 10,
        dropout: float = 0.0,
        finetune: bool = True,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        widths = [_num_units(encoder) for encoder in encoders]
        if widths.count(code_layer) != 1:
            raise ValueError(f"code_layer must be the units of one encoder, {widths}, not {code_layer}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {dropout}")
        self.encoders = nn.ModuleList(encoders)
        self.norm = None if norm_layer is None else norm_layer(code_layer)
        self.fc = nn.Linear(code_layer, num_classes)
        self.dropout, self.finetune = dropout, finetune
        self._depth = widths.index(code_layer) + 1
        self._dropped = widths[: self._depth] if finetune else [code_layer]
        for depth, encoder in enumerate(self.encoders):
            encoder.requires_grad_(finetune and depth < self._depth)

    @property
    def embedding_dim(self) -> int:
        """Values in a code: the inputs of the head."""
        return self.fc.in_features

    @property
    def num_draws(self) -> int:
        """Uniform numbers that `embed` takes for each sample in training."""
        return sum(self._dropped) if self.dropout else 0

    def train(self, mode: bool = True) -> "StackedAutoencoderClassifier":
        super().train(mode)
        if not self.finetune:
            self.encoders.train(False)
        return self

    def embed(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """Codes (N, K) of images (N, C, H, W).

        A unit is dropped where its number of `draws` (N, num_draws), uniform in [0, 1), is below `dropout`; the others
        grow by 1 / (1 - dropout) (Srivastava et al. 2014, section 10). Without draws nothing is dropped.
        """
        code = images.permute(0, 2, 3, 1).flatten(1)
        kept = [] if draws is None else list((draws >= self.dropout).split(self._dropped, dim=1))
        for depth in range(self._depth):
            with torch.set_grad_enabled(self.finetune and torch.is_grad_enabled()):
                code = self.encoders[depth](code)
            if self.norm is not None and depth == self._depth - 1:
                code = self.norm(code)
            if kept and (self.finetune or depth == self._depth - 1):
                code = code * kept.pop(0) / (1 - self.dropout)
        return code

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, C, H, W)."""
        return self.fc(self.embed(images))


def _num_units(encoder: nn.Module) -> int:
    """Outputs of the last linear layer."""
    return [module.out_features for module in encoder.modules() if isinstance(module, nn.Linear)][-1]
