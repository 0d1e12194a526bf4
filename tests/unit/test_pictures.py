"""What a run of q2 draws, and by which module."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from matplotlib.image import imread

from dlops_dist import draw
from dlops_dist.engine.samples import Inputs
from dlops_dist.models.autoencoder import StackedAutoencoder
from dlops_dist.recipes.stacked import pictures
from dlops_dist.recipes.stacked.codes import FlatPixels

INPUTS = Inputs(3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), (4, 5))
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 4, 5, 3), np.uint8)


class Reader:
    in_memory = False
    labels = np.zeros(12, np.int64)

    def __len__(self):
        return 12

    def read(self, ids):
        return IMAGES[ids]


def perfect():
    """A first layer that holds x and -x, from which x is regained; a second that forgets everything."""
    model = StackedAutoencoder(60, (120, 2)).double()
    with torch.no_grad():
        model[0].encoder[0].weight.copy_(torch.cat([torch.eye(60), -torch.eye(60)]))
        model[0].decoder.weight.copy_(model[0].encoder[0].weight.t())
        for parameter in (model[0].encoder[0].bias, *model[1].parameters()):
            parameter.zero_()
    flat_pixels = FlatPixels(INPUTS, torch.float64)
    return SimpleNamespace(model=model, inputs=INPUTS, flat_pixels=flat_pixels, device=torch.device("cpu"))


def test_reconstructions_stand_below_their_images(tmp_path):
    draw.image_grid(tmp_path / "report/pairs.png", pictures.reconstructions(perfect(), Reader(), depth=2))
    grid = (imread(tmp_path / "report/pairs.png")[..., :3] * 255).round().astype(np.uint8)
    assert grid.shape == (3 * 5, 10 * 6, 3)
    mean = np.round(np.array(INPUTS.mean) * 255)
    for column in range(10):
        left = 6 * column
        assert np.array_equal(grid[0:4, left : left + 5], IMAGES[column])
        assert np.array_equal(grid[5:9, left : left + 5], IMAGES[column]), "one layer loses nothing"
        assert np.abs(grid[10:14, left : left + 5] - mean).max() <= 1, "two lose everything but the mean"
    assert (grid[4] == 255).all()


def test_filters_are_drawn_as_images_from_black_to_white(tmp_path):
    draw.image_grid(tmp_path / "filters.png", pictures.filters(perfect()))
    grid = (imread(tmp_path / "filters.png")[..., :3] * 255).round().astype(np.uint8)
    assert grid.shape == (10 * 5, 10 * 6, 3), "the first hundred"
    for unit in (0, 7, 59):
        row, column = divmod(unit, 10)
        tile = grid[5 * row : 5 * row + 4, 6 * column : 6 * column + 5].reshape(-1)
        assert tile.tolist() == [255 * (i == unit) for i in range(60)]


def test_bars_and_confusion_are_pictures(tmp_path):
    draw.class_accuracies(tmp_path / "classes.png", [0.5, None, 1.0], ["a", "b", "c"])
    draw.confusion(tmp_path / "confusion.png", [[1, 0], [2, 3]], ["a", "b"])
    assert all(imread(tmp_path / name).std() > 0 for name in ("classes.png", "confusion.png"))


def test_one_module_alone_imports_matplotlib_and_none_pandas():
    files = Path(draw.__file__).parent.rglob("*.py")
    wanted = re.compile(r"^\s*(import|from) (matplotlib|pandas)", re.MULTILINE)
    assert [path.name for path in files if wanted.search(path.read_text())] == ["draw.py"]
