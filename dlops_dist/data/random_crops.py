"""What an epoch sees of images that are cut out as they are decoded: a random part of each, keyed by sample."""

import numpy as np
import torch
from torch import Tensor

from dlops_dist.config import Augment
from dlops_dist.data.crops import NUM_DRAWS, Cropped
from dlops_dist.data.draws import VIEW, uniform
from dlops_dist.data.keys import key
from dlops_dist.data.readers import Joined, Reader


class RandomCrops:
    """Parts of images that an epoch sees, of each view of a sample its own: keyed by (seed, epoch, sample, view)."""

    in_memory = False

    def __init__(self, reader: Cropped | Joined, seed: int, epoch: int, views: int) -> None:
        self.labels, self._reader, self._views = reader.labels, reader, views
        self._key = key(seed, epoch, "resized crop")

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, ids: np.ndarray) -> Tensor:
        """uint8 (n, height, width, 3), or (n, views, height, width, 3) where there are several."""
        views = torch.from_numpy(ids.astype(np.int64))[:, None] + torch.arange(self._views) * VIEW
        draws = uniform(self._key, views.flatten(), NUM_DRAWS)
        images = torch.as_tensor(self._reader.read(ids.repeat(self._views), draws.numpy()))
        return images if self._views == 1 else images.view(len(ids), self._views, *images.shape[1:])


def in_epoch(reader: Reader, chosen: Augment, seed: int, epoch: int, views: int = 1) -> Reader:
    """What an epoch sees of images: random parts where these are cut out as images are decoded, else the same."""
    if chosen.size is None or chosen.resized_crop is None or not isinstance(reader, Cropped | Joined):
        return reader
    return RandomCrops(reader, seed, epoch, views)
