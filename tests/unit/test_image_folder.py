"""Any tree with a folder for each class; fewer images of a source; the folds of STL-10."""

import os
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dlops_dist.data.order import limited
from dlops_dist.data.pack import pack
from dlops_dist.data.shards import Split, read_manifest
from dlops_dist.data.sources import STL10, ImageFolder, TinyImageNet


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
    found = dict(zip(split.keys_of(np.arange(3)), split.read(np.arange(3)), strict=True))
    assert np.array_equal(found["a_0"], pixels(0))
    assert np.array_equal(found["a_3"], pixels(3)[..., :1].repeat(3, axis=2))


def test_split_folders_in_any_case_and_classes_that_are_called_like_splits(tree):
    root = tree({"Train/a/0.jpg": (0,), "TEST/a/1.jpg": (1,)})
    assert {split: listing.keys for split, listing in ImageFolder(root).splits.items()} == {
        "train": ["a_0"], "test": ["a_1"],
    }  # fmt: skip


def test_what_lies_beside_the_splits_is_passed_over_and_told(tree):
    files = [
        f"{split}/{c}/{i}.jpg" for split, n in (("train", 4), ("valid", 2), ("test", 3)) for c in "ab" for i in range(n)
    ]
    root = tree(dict.fromkeys([*files, "images to predict/0.jpg", "train/stray.jpg", "1.jpg"], (1,)))
    for name in ("train/a/Thumbs.db", "train/a/notes.txt", "__MACOSX/train/a/._0.jpg", "test/b/.DS_Store"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    (root / "train" / "empty").mkdir()
    source = ImageFolder(root)
    assert {split: len(listing.keys) for split, listing in source.splits.items()} == {"train": 8, "test": 6}
    assert source.described.splitlines() == [
        f"{root}: 8 images to train in train/, 6 to test in test/, 2 classes: a 4, b 4",
        "  passed over: 6 images beside the splits: 1.jpg/ 1, images to predict/ 1, valid/ 4",
        "  passed over: 1 images outside of the folders of classes: train/ 1",
        "  passed over: 3 that systems leave behind: __MACOSX, test/b/.DS_Store, train/a/Thumbs.db",
        "  passed over: 1 no images by their endings: train/a/notes.txt",
        "  passed over: 1 folders without an image: train/empty",
    ]


def test_a_test_folder_without_classes_is_passed_over_and_a_part_held_out(tree):
    root = tree(
        {f"train/{c}/{i}.jpg": (i,) for c in "ab" for i in range(10)} | {f"test/{i}.jpg": (i,) for i in range(5)}
    )
    source = ImageFolder(root, test_fraction=0.2)
    assert {split: len(listing.keys) for split, listing in source.splits.items()} == {"train": 16, "test": 4}
    assert "4 to test (20% of each class)" in source.described
    assert "5 images beside the splits: test/ 5" in source.described


def test_a_part_to_test_on_is_refused_where_there_is_a_test_split(tree, user_error):
    root = tree({f"{split}/{c}/0.jpg": (0,) for split in ("train", "val") for c in "ab"})
    with user_error("--test-fraction 0.2", "has a test split, val/"):
        _ = ImageFolder(root, test_fraction=0.2).splits


def test_names_that_are_no_text_are_told_so_that_they_can_be_printed(tree):
    root = tree({f"{split}/{c}/0.jpg": (0,) for split in ("train", "val") for c in "ab"})
    (root / "train/a" / os.fsdecode(b"\xff.txt")).write_bytes(b"")
    assert "\\udcff.txt" in ImageFolder(root).described.encode().decode()


def test_links_are_followed_but_not_in_circles(tree):
    root = tree({"train/a/0.jpg": (0,), "test/a/0.jpg": (0,), "../store/more/1.jpg": (1,), "../store/2.jpg": (2,)})
    store = (root / "../store").resolve()
    (root / "train/a/more").symlink_to(store / "more")
    (root / "train/a/2.jpg").symlink_to(store / "2.jpg")
    (root / "train/b").symlink_to(store / "more")
    (root / "train/a/round").symlink_to(root / "train")
    (root / "train/a/gone.jpg").symlink_to("/nowhere/gone.jpg")
    os.mkfifo(root / "train/a/pipe.jpg")
    source = ImageFolder(root)
    assert source.splits["train"].keys == ["a_0", "a_2", "a_more_1", "b_1"]
    assert "1 links to a folder that they lie in: train/a/round" in source.described
    assert "2 links to nothing, or no plain files: train/a/gone.jpg, train/a/pipe.jpg" in source.described


def test_a_class_has_one_name_in_whatever_unicode_form_it_is_written(tree):
    root = tree({"train/e\u0301t\u00e9/0.jpg": (0,), "test/\u00e9te\u0301/1.jpg": (1,)})
    source = ImageFolder(root)
    assert source.classes == ["\u00e9t\u00e9"]
    assert source.splits["test"].labels.tolist() == [0]


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
    keys = Split(tmp_path / "out", manifest, "train").keys_of(np.arange(5))
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
    names = ["b.c.jpg", "b c.jpg", "b_c.jpg", "1-2.png", "1.jpg", "1.png", "1-3.bmp"]
    root = tree({"test/a/0.jpg": (0,)} | {f"train/a/{name}": (i,) for i, name in enumerate(names)})
    assert len(set(ImageFolder(root).splits["train"].keys)) == 7


@pytest.mark.parametrize(
    ("files", "shown"),
    [
        ({"notes.txt": b""}, "no folders of classes"),
        ({"train/a/0.png": b"no image", "test/a/0.png": b""}, "2 images cannot be packed: "),
        ({"train/0.png": b"", "test/0.png": b""}, "no folders of classes"),
        ({"cat/0.png": b"", "dog/0.png": b"", "test/0.png": b""}, "no folder 'train' beside cat, dog, test"),
        (
            {"train/a/0.png": b"", "train/b/0.png": b"", "more/a/0.png": b""},
            "'train' a split, or a class as 'more' is?",
        ),
        ({"data/a/0.png": b"", "data/b/0.png": b""}, "one class only, 'data', with folders in it"),
        ({"train/deep/a/0.png": b"", "train/deep/b/0.png": b"", "test/deep/a/0.png": b""}, "move them up"),
        ({"data/train/a/0.png": b"", "data/test/a/0.png": b""}, "/data"),
        ({"train/e\u0301/0.png": b"", "train/\u00e9/0.png": b""}, "different Unicode forms"),
        ({"train/a/0.png": b"", "test/b/0.png": b""}, "not in train: b"),
        ({f"{place}/0.png": b"" for place in ("train/a", "test/b", "test/c\x07")}, "is not text"),
        (
            {"train/a/0.png": b"", "train/b/0.png": b"", "test/b/0.png": b"", "test/c/0.png": b""},
            "not in train: c; train has a, b",
        ),
        ({"test/a/0.png": b""}, "no folder 'train'"),
        ({"a/0.png": b"", "b/0.png": b""}, "too few images"),
    ],
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


# open sets


OPEN_SET = {f"train/{c}/{i}.jpg": (i,) for c in ("dog", "ape") for i in range(3)} | {
    f"test/{c}/{i}.jpg": (i,) for c in ("cat", "bee", "eel") for i in range(2)
}


def test_classes_of_which_none_is_in_train_are_an_open_set(tree, tmp_path):
    source = ImageFolder(tree(OPEN_SET))
    assert source.classes == ["ape", "bee", "cat", "dog", "eel"]
    found = {split: (listing.keys[0], listing.labels.tolist()) for split, listing in source.splits.items()}
    assert found == {"train": ("ape_0", [0, 0, 0, 3, 3, 3]), "test": ("bee_0", [1, 1, 2, 2, 4, 4])}
    assert source.described == (
        f"{source.path}: 6 images to train in train/, 6 to test in test/, 2 classes: ape 3, dog 3; "
        f"an open set: 3 other classes to test on: bee, cat, eel"
    )
    manifest = pack(source, tmp_path / "out", "tree", workers=1)
    assert (manifest.classes, manifest.splits) == (source.classes, {"train": 6, "test": 6})


def test_the_first_classes_of_an_open_set_are_those_of_each_split(tree, user_error):
    root = tree(OPEN_SET)
    source = ImageFolder(root, num_classes=1)
    assert source.classes == ["ape", "bee"]
    found = {split: listing.labels.tolist() for split, listing in source.splits.items()}
    assert found == {"train": [0, 0, 0], "test": [1, 1]}
    assert "1 classes: ape 3; an open set: 1 other classes to test on: bee" in source.described
    with user_error("--classes 3", "has 2 classes"):
        _ = ImageFolder(root, num_classes=3).classes


# fewer


@given(st.lists(st.integers(-1, 4), max_size=40), st.integers(1, 50), st.integers(0, 3))
def test_a_limit_keeps_as_many_of_each_class_as_can_be(labels, limit, seed):
    ids = limited(np.array(labels, np.int64), limit, seed).tolist()
    assert len(set(ids)) == min(limit, len(labels))
    assert ids == sorted(ids)
    kept, all_of = [labels[i] for i in ids], {label: labels.count(label) for label in labels}
    most = max((kept.count(label) for label in all_of), default=0)
    assert all(kept.count(label) >= min(number, most - 1) for label, number in all_of.items())


def test_a_limit_is_chosen_by_the_seed():
    chosen = [limited(np.zeros(100, np.int64), 10, seed).tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_limit_leaves_the_images_that_it_chose(tree, tmp_path):
    source = ImageFolder(
        tree({f"{split}/{c}/{i}.jpg": (i,) for split in ("train", "val") for c in "ab" for i in range(9)})
    )
    manifest = pack(source, tmp_path / "out", "tree", seed=5, limit=4, workers=1)
    assert manifest.splits == {"train": 4, "test": 4}
    for name, listing in source.splits.items():
        split = Split(tmp_path / "out", manifest, name)
        assert sorted(split.keys_of(np.arange(len(split)))) == [listing.keys[i] for i in limited(listing.labels, 4, 5)]
        assert np.bincount(split.labels).tolist() == [2, 2]


# folds


def test_folds_of_stl10_come_into_the_index(stl10, tmp_path):
    (stl10 / "fold_indices.txt").write_text("0 1 4 \n1 3\n")
    manifest = pack(STL10(stl10), tmp_path / "out", "stl10", shard_size=2, workers=1)
    assert manifest.num_folds == 2
    split = Split(tmp_path / "out", manifest, "train")
    found = dict(zip(split.keys_of(np.arange(len(split))), split.folds.tolist(), strict=True))
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
