"""ResNet-18 (He et al. 2015, Deep Residual Learning, table 1), with torchvision's parameter names."""

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

NormLayer = Callable[[int], nn.Module]
STAGES = 4


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: y = relu(x' + bn2(conv2(relu(bn1(conv1(x)))))).

    x' is x, or a strided 1x1 projection of it where the shape changes (He et al. 2015, eq. 2).
    """

    def __init__(self, in_channels: int, channels: int, stride: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = norm_layer(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm_layer(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), norm_layer(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    """A stem, four stages of basic blocks, global average pooling and a linear head.

    Args:
        blocks: number of blocks in each of the four stages.
        num_classes: outputs of the head.
        stem: "cifar" (3x3, stride 1, no pooling) or "imagenet" (7x7, stride 2, 3x3 max-pool).
        width: channels of the first stage; each stage doubles them, so an embedding has 8 * width values.
        norm_layer: makes the normalisation of so many channels.
        embedding_norm: scale every embedding to this length, for a head that learns beside a loss of directions
            alone, which leaves the length to chance (Wang et al. 2017, NormFace).
    """

    def __init__(
        self,
        blocks: Sequence[int],
        num_classes: int,
        stem: Literal["cifar", "imagenet"] = "cifar",
        width: int = 64,
        norm_layer: NormLayer = nn.BatchNorm2d,
        embedding_norm: float | None = None,
    ) -> None:
        super().__init__()
        self.embedding_norm = embedding_norm
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem must be 'cifar' or 'imagenet', not {stem!r}")
        if stem == "cifar":
            self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = norm_layer(width)
        self.relu = nn.ReLU(inplace=True)

        channels = width
        for stage, num_blocks in enumerate(blocks):
            out_channels = width * 2**stage
            stride = 1 if stage == 0 else 2
            layers = [BasicBlock(channels, out_channels, stride, norm_layer)]
            layers += [BasicBlock(out_channels, out_channels, 1, norm_layer) for _ in range(num_blocks - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
            channels = out_channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def embedding_dim(self) -> int:
        """Values in an embedding: the inputs of the head."""
        return self.fc.in_features

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings (N, D), the pooled activations before the head, of images (N, 3, H, W)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for stage in range(1, STAGES + 1):
            x = getattr(self, f"layer{stage}")(x)
        x = self.avgpool(x).flatten(1)
        return x if self.embedding_norm is None else F.normalize(x, dim=1) * self.embedding_norm

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, 3, H, W)."""
        return self.fc(self.embed(images))


def resnet18(
    num_classes: int,
    stem: Literal["cifar", "imagenet"] = "cifar",
    width: int = 64,
    norm_layer: NormLayer = nn.BatchNorm2d,
    embedding_norm: float | None = None,
) -> ResNet:
    """ResNet-18: two blocks in each of four stages. Takes torchvision's weights when stem="imagenet"."""
    return ResNet((2, 2, 2, 2), num_classes, stem, width, norm_layer, embedding_norm)
