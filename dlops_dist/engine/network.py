"""The module that is trained: from images as they are stored to embeddings and logits."""

from typing import Any

from torch import Tensor, nn

from dlops_dist.data.augment import Normalize


class TwoOutputs(nn.Module):
    """Embeddings (N, D) and logits (N, C) of uint8 images (N, H, W, 3): the module that DDP and compile wrap.

    With `detach_head` the head learns on embeddings that its loss does not change.
    """

    def __init__(self, normalize: Normalize, model: Any, detach_head: bool) -> None:
        super().__init__()
        self.normalize, self.model, self.detach_head = normalize, model, detach_head

    def forward(self, images: Tensor, *draws: Tensor) -> tuple[Tensor, Tensor]:
        """`draws` are the random numbers that the model takes in training, if it takes any."""
        embeddings = self.model.embed(self.normalize(images), *draws)
        logits = self.model.fc(embeddings.detach() if self.detach_head else embeddings)
        return embeddings, logits
