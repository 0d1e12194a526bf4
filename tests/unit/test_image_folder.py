"""Any tree with a folder for each class; fewer images of a source; all of one size; the folds of STL-10."""

import io
import os
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dlops_dist.data.codec import decode
from dlops_dist.data.pack import pack
from dlops_dist.data.shards import Split, read_manifest
from dlops_dist.data.sources import STL10, ImageFolder, Limited, Listing, Resized, TinyImageNet


def pixels(seed, height=8, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def tree(tmp_path, jpeg):
    """{path below the root: (seed, height, width)} written as images, by their endings."""

    def write(files):
        for name, (seed, *size) in files.items():
            path = tmp_path / "tree" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix.lower() in (".jpg", ".jpeg"):
                path.write_bytes(jpeg(pixels(seed, *size)))
            else:
                Image.fromarray(pixels(seed, *size)).save(path)
        return tmp_path / "tree"

    return write


def test_folders_of_train_and_val(tree):
    names = ["train/dog/b.jpg", "train/dog/deep/a.jpeg", "train/cat/x.y.JPG", "val/cat/1.jpg", "val/dog/2.jpg"]
    root = tree({name: (seed,) for seed, name in enumerate(names)})
    (root / "train" / "notes.txt").write_text("no folder")
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    source = ImageFolder(root)
    assert (source.classes, source.extension) == (["cat", "dog"], "jpg")
    train, test = source.splits["train"], source.splits["test"]
    assert (train.keys, train.labels.tolist()) == (["cat_x_y", "dog_b", "dog_deep_a"], [0, 1, 1])
    assert (test.keys, test.labels.tolist()) == (["cat_1", "dog_2"], [0, 1])
    assert source.read("train", 2) == (root / names[1]).read_bytes()


def test_a_tree_without_a_test_split_holds_out_a_part_of_each_class(tree):
    root = tree({f"{name}/{i}.jpg": (i,) for name in ("a", "b") for i in range(20)})
    splits = ImageFolder(root, test_fraction=0.25).splits
    assert {split: np.bincount(listing.labels).tolist() for split, listing in splits.items()} == {
        "train": [15, 15], "test": [5, 5],
    }  # fmt: skip
    assert sorted(splits["train"].keys + splits["test"].keys) == sorted(f"{n}_{i}" for n in "ab" for i in range(20))


def test_what_is_no_jpeg_is_packed_as_raw_pixels(tree, tmp_path):
    root = tree({"train/a/0.png": (0,), "train/a/1.jpg": (1,), "test/a/2.bmp": (2,)})
    grey = Image.fromarray(pixels(3)[..., 0])
    grey.save(root / "train/a/3.png")
    pack(ImageFolder(root), tmp_path / "out", "tree", workers=1)
    split = Split(tmp_path / "out", read_manifest(tmp_path / "out"), "train")
    found = dict(zip(split.keys, split.read(np.arange(3)), strict=True))
    assert np.array_equal(found["a_0"], pixels(0))
    assert np.array_equal(found["a_3"], pixels(3)[..., :1].repeat(3, axis=2))


def test_split_folders_in_any_case_and_classes_that_are_called_like_splits(tree):
    root = tree({"Train/a/0.jpg": (0,), "TEST/a/1.jpg": (1,)})
    assert {split: listing.keys for split, listing in ImageFolder(root).splits.items()} == {
        "train": ["a_0"], "test": ["a_1"],
    }  # fmt: skip


def test_a_class_may_be_called_training(tree):
    root = tree({f"{name}/deep/{i}.jpg": (i,) for name in ("racing", "training") for i in range(10)})
    source = ImageFolder(root)
    assert source.classes == ["racing", "training"]
    assert {split: len(listing.keys) for split, listing in source.splits.items()} == {"train": 18, "test": 2}


def test_what_a_mac_leaves_is_passed_over(tree):
    root = tree({"train/a/0.jpg": (0,), "train/a/._0.jpg": (1,), "test/a/1.jpg": (1,), "train/.hidden/2.jpg": (2,)})
    source = ImageFolder(root)
    assert (source.classes, source.splits["train"].keys) == (["a"], ["a_0"])


def test_odd_names_of_files_become_keys_and_long_ones_are_shortened(tree, tmp_path):
    names = ["日本/été.jpg", f"日本/{'long' * 30}.jpg", f"日本/{'long' * 30}2.jpg", "日本/__a__.jpg"]
    root = tree({f"{split}/{name}": (i,) for split in ("train", "test") for i, name in enumerate(names)})
    (root / "train/日本" / os.fsdecode(b"\xff.jpg")).write_bytes((root / "train" / names[0]).read_bytes())
    manifest = pack(ImageFolder(root), tmp_path / "out", "tree", workers=1)
    assert manifest.splits == {"train": 5, "test": 4}
    keys = Split(tmp_path / "out", manifest, "train").keys
    assert "日本_été" in keys
    assert all(key.isprintable() and not key.startswith("__") for key in keys)


def test_files_that_change_while_they_are_packed_are_an_error(tree, tmp_path, user_error):
    root = tree({f"{split}/a/{i}.jpg": (i,) for split in ("train", "test") for i in range(3)})

    def touch(done, total):
        os.utime(root / "train/a/0.jpg", (0, 0))

    with user_error("changed while they were packed"):
        pack(ImageFolder(root), tmp_path / "out", "tree", workers=1, on_progress=touch)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_files_that_come_while_it_is_packed_change_no_label(tree, tmp_path):
    """Other processes see the listing of the one that started them."""
    root = tree({f"{split}/{c}/{i}.jpg": (ord(c),) for split in ("train", "test") for c in "ab" for i in range(4)})
    source = pickle.loads(pickle.dumps(listed := ImageFolder(root)))
    assert source.splits.keys() == listed.splits.keys()
    source = pickle.loads(pickle.dumps(listed))
    (root / "train/a/00.jpg").write_bytes((root / "train/b/0.jpg").read_bytes())
    for i, label in enumerate(listed.splits["train"].labels):
        assert source.read("train", i) == (root / f"train/{'ab'[label]}/0.jpg").read_bytes()


def test_names_that_become_equal_are_told_apart(tree):
    root = tree({"train/a/b.c.jpg": (0,), "train/a/b c.jpg": (1,), "train/a/b_c.jpg": (2,), "test/a/0.jpg": (3,)})
    assert len(set(ImageFolder(root).splits["train"].keys)) == 3


@pytest.mark.parametrize(
    ("files", "shown"),
    [
        ({"notes.txt": b""}, "no folders of classes"),
        ({"train/a/0.png": b"no image", "test/a/0.png": b""}, "0.png"),
        ({"train/a/0.txt": b""}, "has no image in it"),
        ({"train/a/0.png": b"", "test/b/0.png": b""}, "not in train: b"),
        ({"test/a/0.png": b""}, "no folder 'train'"),
        ({"a/0.png": b"", "b/0.png": b""}, "too few images"),
    ],
    ids=["no classes", "no image", "an empty class", "a class of test alone", "test alone", "too few to hold out"],
)
def test_a_tree_that_cannot_be_packed_is_named(files, shown, tmp_path, user_error):
    for name, content in files.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(content)
    with user_error(shown):
        pack(ImageFolder(tmp_path / "tree"), tmp_path / "out", "tree", workers=1)


def test_images_of_different_sizes_are_refused_with_what_to_do(tree, tmp_path, user_error):
    root = tree({"train/a/0.jpg": (0, 8, 8), "train/a/1.jpg": (1, 8, 9), "test/a/2.jpg": (2,)})
    with user_error("(8, 9, 3)", "--size"):
        pack(ImageFolder(root), tmp_path / "out", "tree", workers=1)


def test_pixels_of_16_bits_are_refused(tmp_path, user_error):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(tmp_path / split / "a" / "0.png")
    with user_error("0.png", "I;16"):
        ImageFolder(tmp_path).read("train", 0)


def test_a_png_bomb_is_refused_unread(tmp_path, user_error):
    path = tmp_path / "train" / "a" / "0.png"
    path.parent.mkdir(parents=True)
    Image.new("1", (9000, 9000)).save(path)
    assert path.stat().st_size < 2**20
    with user_error(path, "9000"):
        ImageFolder(tmp_path, test_fraction=0).read("train", 0)


# fewer, or of one size


class Labels:
    """A source of nothing but labels."""

    extension = "jpg"

    def __init__(self, labels):
        self.classes = [str(label) for label in range(max(labels, default=0) + 1)]
        self.splits = {"train": Listing([f"{i:03d}" for i in range(len(labels))], np.array(labels, np.int64))}

    def read(self, split, index):
        return self.splits[split].keys[index].encode()


@given(st.lists(st.integers(-1, 4), max_size=40), st.integers(1, 50), st.integers(0, 3))
def test_a_limit_keeps_as_many_of_each_class_as_can_be(labels, limit, seed):
    limited = Limited(Labels(labels), limit, seed)
    keys, kept, _ = limited.splits["train"]
    assert len(keys) == min(limit, len(labels))
    assert keys == sorted(keys)
    assert [labels[int(k)] for k in keys] == kept.tolist()
    assert [limited.read("train", i).decode() for i in range(len(keys))] == keys
    all_of = {label: labels.count(label) for label in labels}
    most = max((kept.tolist().count(label) for label in all_of), default=0)
    assert all(kept.tolist().count(label) >= min(number, most - 1) for label, number in all_of.items())


def test_a_limit_is_chosen_by_the_seed():
    labels = [0] * 100
    chosen = [tuple(Limited(Labels(labels), 10, seed).splits["train"].keys) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_resized_images_fill_the_square_and_keep_their_middle(ending, tree, tmp_path):
    """A wide image, black on its left and right quarters: they are cropped away."""
    wide = np.zeros((16, 32, 3), np.uint8)
    wide[:, 8:24] = 200
    root = tree({f"train/a/0.{ending}": (0,), f"test/a/1.{ending}": (1,)})
    Image.fromarray(wide).save(root / f"train/a/wide.{ending}", quality=95, subsampling=0)
    source = Resized(ImageFolder(root), 8)
    assert source.read("train", 0) == ImageFolder(root).read("train", 0)  # has the size already
    image = decode(source.read("train", 1), source.extension)
    assert image.shape == (8, 8, 3)
    assert np.abs(image[:, 2:6].astype(int) - 200).max() <= (4 if ending == "jpg" else 0)
    assert image.min() > 160  # at the edges the interpolation sees a little of what is cropped
    manifest = pack(source, tmp_path / "out", "tree", workers=1)
    assert (manifest.height, manifest.width) == (8, 8)


def test_cmyk_is_read_where_images_are_resized(tmp_path):
    path = tmp_path / "train" / "a" / "0.jpg"
    path.parent.mkdir(parents=True)
    file = io.BytesIO()
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(file, "JPEG")
    path.write_bytes(file.getvalue())
    image = decode(Resized(ImageFolder(tmp_path, test_fraction=0), 8).read("train", 0), "jpg")
    assert np.abs(image.astype(int) - (255, 0, 0)).max() < 10


# folds


def test_folds_of_stl10_come_into_the_index(stl10, tmp_path):
    (stl10 / "fold_indices.txt").write_text("0 1 4 \n1 3\n")
    manifest = pack(STL10(stl10), tmp_path / "out", "stl10", shard_size=2, workers=1)
    assert manifest.num_folds == 2
    split = Split(tmp_path / "out", manifest, "train")
    found = dict(zip(split.keys, split.folds.tolist(), strict=True))
    assert found == {"train-000000": 1, "train-000001": 3, "train-000002": 0, "train-000003": 2, "train-000004": 1}
    assert (Split(tmp_path / "out", manifest, "unlabeled").folds == 0).all()


@pytest.mark.parametrize("content", ["0 5\n", "-1\n", "one\n", "0\n" * 32])
def test_folds_that_cannot_be_are_named(content, stl10, user_error):
    (stl10 / "fold_indices.txt").write_text(content)
    with user_error(stl10 / "fold_indices.txt", "fetch the dataset again"):
        _ = STL10(stl10).splits


def test_without_a_file_of_folds_there_are_none(stl10, tiny_zip, tmp_path):
    (stl10 / "fold_indices.txt").unlink()
    assert pack(STL10(stl10), tmp_path / "a", "stl10", workers=1).num_folds == 0
    assert pack(TinyImageNet(tiny_zip), tmp_path / "b", "tiny", workers=1).num_folds == 0
