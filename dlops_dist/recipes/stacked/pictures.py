"""What a run of q2 learnt, as images: uint8, (N, H, W, 3)."""

import numpy as np
import torch
from torch import Tensor

from dlops_dist.data.readers import Reader
from dlops_dist.recipes.stacked.reconstruction import ReconstructionLearner

FILTERS, SHOWN = 100, 10


def filters(learner: ReconstructionLearner) -> np.ndarray:
    """Weights of the first layer's units, each stretched to all of [0, 1]."""
    weight = next(learner.model.encoders[0].parameters()).detach()[:FILTERS].float().cpu()
    weight = weight - weight.amin(dim=1, keepdim=True)
    weight = weight / weight.amax(dim=1, keepdim=True).clamp(min=1e-12)
    return (weight * 255).byte().view(-1, *learner.inputs.image_size, 3).numpy()


@torch.no_grad()
def reconstructions(learner: ReconstructionLearner, test: Reader, depth: int) -> np.ndarray:
    """The first test images, and after them what is left of them at each depth."""
    learner.model.eval()
    images = torch.as_tensor(test.read(np.arange(min(SHOWN, len(test))))).to(learner.device)
    x = learner.flat_pixels(images)
    rows = [images]
    for level in range(1, depth + 1):
        decoded = learner.model.decode(learner.model.encode(x, level), level)
        rows.append(_pixels(decoded.view(images.shape), learner))
    return torch.cat(rows).cpu().numpy()


def _pixels(x: Tensor, learner: ReconstructionLearner) -> Tensor:
    """Images from normalised ones."""
    mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device) for v in (learner.inputs.mean, learner.inputs.std))
    return ((x * std + mean) * 255).round().clamp(0, 255).byte()
