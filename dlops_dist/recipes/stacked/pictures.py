"""Pictures that a run of q2 leaves in its report/."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlops_dist.data.inspection import sample_grid
from dlops_dist.data.readers import Reader
from dlops_dist.data.shards import Manifest
from dlops_dist.recipes.stacked.reconstruction import ReconstructionLearner

COLUMNS = 10
FILTERS = 100


def draw_samples(path: Path, shards: Path, manifest: Manifest) -> None:
    """Training images, a row for each class."""
    _save(path, sample_grid(shards, manifest))


def draw_filters(path: Path, learner: ReconstructionLearner, manifest: Manifest) -> None:
    """Weights of the first layer's units, each stretched to all of [0, 1]."""
    weight = next(learner.model.encoders[0].parameters()).detach()[:FILTERS].float().cpu()
    weight = weight - weight.amin(dim=1, keepdim=True)
    weight = weight / weight.amax(dim=1, keepdim=True).clamp(min=1e-12)
    _save(path, _grid((weight * 255).byte().view(-1, manifest.height, manifest.width, 3)))


@torch.no_grad()
def draw_reconstructions(path: Path, learner: ReconstructionLearner, test: Reader, depth: int) -> None:
    """The first test images, and below them what is left of them at each depth."""
    learner.model.eval()
    ids = np.arange(min(COLUMNS, len(test)))
    images = torch.as_tensor(test.read(ids)).to(learner.device)
    x = learner.flat_pixels(images)
    rows = [images]
    for level in range(1, depth + 1):
        decoded = learner.model.decode(learner.model.encode(x, level), level)
        rows.append(_pixels(decoded.view(images.shape), learner))
    _save(path, _grid(torch.cat(rows).cpu(), len(ids)))


def _pixels(x: Tensor, learner: ReconstructionLearner) -> Tensor:
    """uint8 images from normalised ones, (N, H, W, C)."""
    mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device) for v in (learner.inputs.mean, learner.inputs.std))
    return ((x * std + mean) * 255).round().clamp(0, 255).byte()


def _grid(images: Tensor, columns: int = COLUMNS) -> np.ndarray:
    """Images (N, H, W, C) in rows, one pixel apart, (height, width, C)."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    grid = np.full((rows * columns, height + 1, width + 1, channels), 255, np.uint8)
    grid[:n, :height, :width] = images.numpy()
    grid = grid.reshape(rows, columns, height + 1, width + 1, channels).swapaxes(1, 2)
    return grid.reshape(rows * (height + 1), columns * (width + 1), channels)


def _save(path: Path, pixels: np.ndarray) -> None:
    from matplotlib.image import imsave

    path.parent.mkdir(exist_ok=True)
    imsave(path, pixels)


def draw_class_accuracies(path: Path, accuracies: Sequence[float | None], classes: Sequence[str]) -> None:
    """A bar for each class."""
    figure, axes = _figure(max(4.0, 0.6 * len(classes)), 4.0)
    bars = axes.bar(range(len(classes)), [100 * (value or 0) for value in accuracies])
    axes.bar_label(bars, fmt="%.0f")
    axes.set(title="Test top-1 of each class", ylabel="%", ylim=(0, 105))
    axes.set_xticks(range(len(classes)), _plain(classes), rotation=45, ha="right")
    _finish(path, figure)


def draw_confusion(path: Path, confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> None:
    """How many test samples of a class (row) were taken for which (column)."""
    size = max(4.0, 0.6 * len(classes))
    figure, axes = _figure(size, size)
    counts = np.asarray(confusion)
    axes.imshow(counts, cmap="Blues")
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if count > counts.max() / 2 else "black"
        axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=color)
    axes.set(title="Confusion on test", xlabel="taken for", ylabel="is")
    axes.set_xticks(range(len(classes)), _plain(classes), rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), _plain(classes))
    _finish(path, figure)


def _plain(names: Sequence[str]) -> list[str]:
    """Names as they are: a dollar sign begins no formula."""
    return [name.replace("$", r"\$") for name in names]


def _figure(width: float, height: float) -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")


def _finish(path: Path, figure: Any) -> None:
    from matplotlib import pyplot as plt

    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
