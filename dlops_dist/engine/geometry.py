"""Where embeddings lie: on a map, how far from each other, and which are nearest."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS, RANGES = 5, 40


def plane(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Places (n, 2) of rows (n, D) along the two directions of largest variance, and these' parts of it.

    Of the smaller of the two products with the centred rows; the place farthest out along a direction is positive.
    """
    x = x.double().nan_to_num()
    x = x - x.mean(dim=0)
    wide = x.shape[0] < x.shape[1]
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    places = vectors[:, :2] * values[:2].sqrt() if wide else x @ vectors[:, :2]
    places, parts = (F.pad(part, (0, 2))[..., :2] for part in (places, values / values.sum()))
    farthest = places.gather(0, places.abs().argmax(dim=0, keepdim=True))
    return (places * farthest.sign()).float().numpy(), parts.nan_to_num().numpy()


def pair_distances(x: Tensor, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranges of the distance between two rows of x (n, D), (b + 1,), and the part of the pairs in each, (2, b): of
    those with the same label, and of the others; zeros where there are none.
    """
    one, other = np.triu_indices(len(x), k=1)
    between = F.pdist(x.nan_to_num()).numpy()
    ends = np.linspace(0, max(between.max(initial=0), 1e-9), RANGES + 1)
    same = labels[one] == labels[other]
    counts = [np.histogram(between[chosen], ends)[0] / max(1, chosen.sum()) for chosen in (same, ~same)]
    return ends, np.stack(counts)


def neighbours(x: Tensor, queries: np.ndarray) -> np.ndarray:
    """(q, 1 + k): rows of x (n, D), each followed by the others nearest to it, nearest first."""
    rows = torch.from_numpy(queries)
    distances = torch.cdist(x[rows], x, compute_mode="donot_use_mm_for_euclid_dist")
    distances.scatter_(1, rows[:, None], torch.inf)
    nearest = distances.sort(dim=1, stable=True).indices[:, : min(NEIGHBOURS, len(x) - 1)]
    return torch.cat([rows[:, None], nearest], dim=1).numpy()
