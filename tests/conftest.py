"""Data that many tests share: small generated shards, packed once."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: several processes share the cores

import torch
from PIL import Image
from xdist.scheduler import LoadScopeScheduling

from dlops_dist.data.pack import pack
from dlops_dist.data.shapes import CLASSES, draw, write_stl10, write_tiny_imagenet
from dlops_dist.data.sources import STL10, ImageFolder, TinyImageNet


def group_of(nodeid):
    """Tests that one process takes: those of a file, all that keep ranks, all that need a Ray cluster."""
    file = nodeid.split("::")[0]
    if file.startswith("tests/distributed/"):
        return "ranks"
    return "ray" if file.endswith(("test_ray.py", "test_tune.py", "test_slurm.py")) else file


class ByGroup(LoadScopeScheduling):
    def _split_scope(self, nodeid):
        return group_of(nodeid)


def pytest_collection_modifyitems(items):
    """The longest groups come first, so that several processes end together."""
    items.sort(key=lambda item: {"ray": 0, "ranks": 1}.get(group_of(item.nodeid), 2))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return ByGroup(config, log)


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same numbers in each run: a new process seeds torch by chance."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shapes_shards(tmp_path_factory):
    """Folder of `shapes` shards: 10 classes, 24 training and 6 test images each, 32 x 32."""
    folder = tmp_path_factory.mktemp("shapes")
    write_tiny_imagenet(folder / "shapes.zip", train_per_class=24, test_per_class=6, size=32)
    pack(TinyImageNet(folder / "shapes.zip"), folder / "shards", "shapes", shard_size=100, workers=1)
    return folder / "shards"


@pytest.fixture(scope="session")
def any_size_shards(tmp_path_factory):
    """Folder of `shapes` as they came: 10 classes, 5 training and 2 test images each, jpg, png and webp of 20 to 60."""
    folder = tmp_path_factory.mktemp("any-size")
    for number in range(70):
        label, split = number % 10, "train" if number < 50 else "test"
        kind, options = [("jpg", {"quality": 90}), ("png", {}), ("webp", {"lossless": True})][number % 3]
        image = Image.fromarray(draw(label, number, 60)).resize((20 + number * 7 % 41, 20 + number * 11 % 41))
        path = folder / "tree" / split / CLASSES[label] / f"{number}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)
    pack(ImageFolder(folder / "tree"), folder / "shards", "any-size", shard_size=20, workers=1, keep=True)
    return folder / "shards"


@pytest.fixture(scope="session")
def stl_shards(tmp_path_factory):
    """Folder of `shapes-stl10` shards: 10 classes, 8 training and 3 test images each, 45 unlabeled, ten folds."""
    folder = tmp_path_factory.mktemp("shapes-stl10")
    write_stl10(folder / "stl10_binary", train_per_class=8, test_per_class=3, num_unlabeled=45)
    pack(STL10(folder), folder / "shards", "shapes-stl10", shard_size=100, workers=1)
    return folder / "shards"
