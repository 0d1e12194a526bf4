"""Data that many tests share: small generated shards, packed once."""

import pytest

from dlops_dist.data.pack import pack
from dlops_dist.data.shapes import write_tiny_imagenet
from dlops_dist.data.sources import TinyImageNet


@pytest.fixture(scope="session")
def shapes_shards(tmp_path_factory):
    """Folder of `shapes` shards: 10 classes, 24 training and 6 test images each, 32 x 32."""
    folder = tmp_path_factory.mktemp("shapes")
    write_tiny_imagenet(folder / "shapes.zip", train_per_class=24, test_per_class=6, size=32)
    pack(TinyImageNet(folder / "shapes.zip"), folder / "shards", "shapes", shard_size=100, workers=1)
    return folder / "shards"
