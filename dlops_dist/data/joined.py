"""Several readers as one: labelled and unlabeled images to pretrain on."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dlops_dist.data.readers import Reader, on_device


class Joined:
    """The samples of the first reader, then those of the next: sample ids run through all of them."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self._readers = readers
        self._ends = np.cumsum([len(reader) for reader in readers])
        self.in_memory = all(reader.in_memory for reader in readers)
        self.labels = np.concatenate([reader.labels for reader in readers])

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, ids: np.ndarray) -> Tensor:
        """uint8 (n, height, width, 3), in the order of the ids."""
        of = np.searchsorted(self._ends, ids, side="right")
        parts, places = [], []
        for i, reader in enumerate(self._readers):
            place = np.flatnonzero(of == i)
            first = self._ends[i] - len(reader)
            parts.append(torch.as_tensor(reader.read(ids[place] - first)))
            places.append(place)
        images = torch.cat(parts)
        return images[on_device(np.argsort(np.concatenate(places), kind="stable"), images.device)]
