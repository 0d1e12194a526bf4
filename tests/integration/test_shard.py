"""launch/shard.py, from the command line: is a folder as it was packed, and what is in it."""

import shutil

import numpy as np
import pytest
from command import run
from PIL import Image

from dlops_dist.data.shards import Split, read_manifest


@pytest.fixture
def shards(shapes_shards, tmp_path):
    return shutil.copytree(shapes_shards, tmp_path / "shapes")


def flip_a_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "train-000000.tar has changed": lambda shards: flip_a_bit(shards / "train-000000.tar", 5000),
    "test-000000.tar has changed": lambda shards: flip_a_bit(shards / "test-000000.tar", -1),
    "train-000001.tar is missing": lambda shards: (shards / "train-000001.tar").unlink(),
    "index.parquet has changed": lambda shards: flip_a_bit(shards / "index.parquet", 100),
    "train-000009.tar does not belong there": lambda shards: (shards / "train-000009.tar").write_bytes(b"?"),
    "train-000002.tar is 9 bytes long": lambda shards: (shards / "train-000002.tar").write_bytes(bytes(9)),
}


def test_verify_finds_nothing_in_what_was_packed(shards):
    code, output = run("shard", "verify", shards)
    assert code == 0, output
    assert output.splitlines()[-1].startswith(f"{shards}: 4 shards, every byte as it was packed; dataset id ")


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_what_is_damaged(damage, shards):
    DAMAGES[damage](shards)
    code, output = run("shard", "verify", shards)
    assert code == 1, output
    assert output.splitlines()[-1].startswith(f"failed: {shards}: {damage}")
    assert "Traceback" not in output


def test_show_counts_the_classes_and_draws_samples(shards):
    code, output = run("shard", "show", shards)
    assert code == 0, output
    lines = output.splitlines()
    assert lines[0].split() == ["class", "train", "test"]
    assert [line.split()[-2:] for line in lines[1:11]] == [["24", "6"]] * 10
    picture = np.asarray(Image.open(shards.parent / "shapes-samples.png").convert("RGB"))
    assert picture.shape == (10 * 32, 10 * 32, 3)
    train = Split(shards, read_manifest(shards), "train")
    third_of_class_4 = np.flatnonzero(train.labels == 4)[2]
    assert (picture[4 * 32 : 5 * 32, 2 * 32 : 3 * 32] == train.read(np.array([third_of_class_4]))[0]).all()
    assert sorted(path.name for path in shards.iterdir()) == sorted(
        ["index.parquet", "manifest.json", "test-000000.tar", *(f"train-{i:06d}.tar" for i in range(3))]
    )


@pytest.mark.parametrize("command", ["verify", "show"])
def test_a_folder_that_is_not_packed_is_one_line(command, tmp_path):
    code, output = run("shard", command, tmp_path)
    assert (code, len(output.splitlines())) == (2, 1), output
