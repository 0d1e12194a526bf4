"""Two readers as one."""

import numpy as np
import pytest
import torch

from dlops_dist.data.readers import Joined


class Numbered:
    """Images whose every pixel is `first` plus their id."""

    in_memory = False

    def __init__(self, size, first):
        self.labels, self._first = np.full(size, first), first

    def __len__(self):
        return len(self.labels)

    def read(self, ids):
        assert ((ids >= 0) & (ids < len(self))).all()
        return np.broadcast_to((ids + self._first).astype(np.uint8)[:, None, None, None], (len(ids), 2, 2, 3)).copy()


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [4, 0, 3, 2], [3, 4], [1, 1, 4, 1], []])
def test_ids_run_through_all_readers(ids):
    joined = Joined([Numbered(2, 0), Numbered(3, 100)])
    assert len(joined) == 5
    assert joined.labels.tolist() == [0, 0, 100, 100, 100]
    read = joined.read(np.array(ids, np.int64))
    assert (read.shape, read.dtype) == ((len(ids), 2, 2, 3), torch.uint8)
    assert read[:, 0, 0, 0].tolist() == [[0, 1, 100, 101, 102][i] for i in ids]
