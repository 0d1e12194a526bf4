"""Shards that others wrote: read where they lie, equal to what stock webdataset reads; damaged ones by name."""

import io
import json
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from dlops_dist.data.adopt import _read, adopt
from dlops_dist.data.shards import Split, read_manifest
from dlops_dist.errors import UserError


def pixels(seed, size=(8, 8)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def write(path, samples):
    """A tar of {member name: bytes} dicts, by Python's tarfile with owner and time, as others do."""
    with tarfile.open(path, "w") as archive:
        for sample in samples:
            for name, content in sample.items():
                info = tarfile.TarInfo(name)
                info.size, info.mtime, info.uname = len(content), 1_700_000_000, "someone"
                archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def sample(jpeg):
    def make(key, label, seed=0, **more):
        members = {f"{key}.jpg": jpeg(pixels(seed)), f"{key}.cls": str(label).encode()}
        return members | {f"{key}.{extension}": content for extension, content in more.items()}

    return make


@pytest.fixture
def folder(tmp_path, sample):
    """Two training shards and one of val."""
    for number in range(2):
        path = tmp_path / f"imagenet-train-{number:02d}.tar"
        write(path, [sample(f"n01/{number}-{i}", (i * 7) % 5, 10 * number + i) for i in range(6)])
    write(tmp_path / "imagenet-val-00.tar", [sample(f"v{i}", i, 30 + i, txt=b"words") for i in range(4)])
    return tmp_path


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_read_is_what_stock_webdataset_reads(workers, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = adopt(folder, "others", workers=workers)
    assert read_manifest(folder) == manifest
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert manifest.splits == {"train": 12, "test": 4}
    assert manifest.classes == ["0", "1", "2", "3", "4"]
    for name, pattern in (("train", "imagenet-train-{00..01}.tar"), ("test", "imagenet-val-00.tar")):
        split = Split(folder, manifest, name)
        stock = list(wds.WebDataset(str(folder / pattern), shardshuffle=False).decode("pil").to_tuple("jpg", "cls"))
        images = split.read(np.arange(len(split)))
        assert split.labels.tolist() == [label for _, label in stock]
        for image, (expected, _) in zip(images, stock, strict=True):
            assert np.array_equal(image, np.asarray(expected))
    train = Split(folder, manifest, "train").read(np.arange(12)) / 255
    assert np.allclose(manifest.mean, train.mean(axis=(0, 1, 2)))


def test_stock_shard_writer_long_names_json_labels_and_raw_pixels(tmp_path):
    def raw(seed):
        file = io.BytesIO()
        np.save(file, pixels(seed))
        return file.getvalue()

    with wds.TarWriter(str(tmp_path / "train-0.tar"), encoder=False) as sink:
        for i in range(3):
            label = json.dumps({"label": i, "caption": "x" * 300}).encode()
            sink.write({"__key__": f"{'long' * 40}/{i}", "npy": raw(i), "json": label})
    with wds.TarWriter(str(tmp_path / "unlabeled-0.tar"), encoder=False) as sink:
        sink.write({"__key__": "u", "npy": raw(9), "json": b"{}"})
    manifest = adopt(tmp_path, "others", ["a", "b", "c"], workers=1)
    assert (manifest.extension, manifest.splits) == ("npy", {"train": 3, "unlabeled": 1})
    train, unlabeled = (Split(tmp_path, manifest, name) for name in ("train", "unlabeled"))
    assert np.array_equal(train.read(np.array([2])), pixels(2)[None])
    assert (train.labels.tolist(), unlabeled.labels.tolist()) == ([0, 1, 2], [-1])
    assert train.keys[0].startswith("longlong")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("imagenet-pretrained-val-000.tar", "test"), ("constrained-test-0.tar", "test"), ("latest_train.tar", "train"),
        ("TRAIN-1.tar", "train"), ("stl-unlabeled-2.tar", "unlabeled"),
    ],
)  # fmt: skip
def test_whole_words_of_a_name_tell_the_split(name, split, sample, tmp_path):
    path = write(tmp_path / name, [sample("a", 0)])
    assert _read(None, path)[1].shard.split == split


def test_shards_of_val_and_of_test_are_not_mixed(folder, sample, user_error):
    write(folder / "imagenet-test-00.tar", [sample("t", 0)])
    with user_error(folder, "val", "test"):
        adopt(folder, "others", workers=1)


def test_what_was_packed_here_keeps_its_manifest(shapes_shards, tmp_path, user_error):
    shards = shutil.copytree(shapes_shards, tmp_path / "shards")
    before = (shards / "manifest.json").read_bytes()
    with user_error(shards, "launch/shard.py"):
        adopt(shards, "others", workers=1)
    assert (shards / "manifest.json").read_bytes() == before


def test_files_without_an_ending_and_those_of_a_mac_are_passed_over(sample, tmp_path):
    members = {"README": b"words", "._a.jpg": b"mac", **sample("__a", 0), "LICENSE": b"more"}
    write(tmp_path / "train-0.tar", [members])
    assert adopt(tmp_path, "others", workers=1).splits == {"train": 1}


FAULTS = {
    "no tar at all": ({}, ["no .tar files"]),
    "no split in the name": ({"data-0.tar": [("a", {})]}, ["data-0.tar", "train"]),
    "an odd name": ({"train 0.tar": [("a", {})]}, ["train 0.tar", "letters"]),
    "no training shard": ({"test-0.tar": [("a", {})]}, ["train"]),
    "no label": ({"train-0.tar": [("a", {"cls": None})]}, ["train-0.tar", "a", "no label"]),
    "a label that is a word": ({"train-0.tar": [("a", {"cls": b"cat"})]}, ["train-0.tar", "a", "'cat'"]),
    "a negative label": ({"train-0.tar": [("a", {"cls": b"-3"})]}, ["train-0.tar", "a", "'-3'"]),
    "a label that is no text": ({"train-0.tar": [("a", {"cls": b"\xff\xfe"})]}, ["train-0.tar", "a"]),
    "no image": ({"train-0.tar": [("a", {"jpg": None})]}, ["train-0.tar", "a", "0 images"]),
    "a damaged image": ({"train-0.tar": [("a", {"jpg": b"\xff\xd8nonsense"})]}, ["train-0.tar", "a"]),
    "another size": ({"train-0.tar": [("a", {}), ("b", {"jpg": (9, 9)})]}, ["train-0.tar", "b", "(9, 9, 3)"]),
    "two kinds": ({"train-0.tar": [("a", {}), ("b", {"jpg": None, "npy": b""})]}, ["train-0.tar", "b", "npy"]),
    "two splits in the name": ({"train-test-0.tar": [("a", {})]}, ["train-test-0.tar"]),
    "a label beyond all classes": ({"train-0.tar": [("a", {"cls": b"300000000"})]}, ["300000000"]),
    "a pickle": ({"train-0.tar": [("a", {"pyd": pickle.dumps(1)})]}, ["train-0.tar", "a.pyd", "pickled"]),
    "a key twice": ({"train-0.tar": [("a", {}), ("b", {}), ("a", {})]}, ["train-0.tar", "a", "twice"]),
    "a member twice": ({"train-0.tar": [("a", {}), ("a", {})]}, ["train-0.tar", "a.jpg", "twice"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_read_is_named_and_leaves_nothing(fault, sample, jpeg, tmp_path, user_error):
    archives, shown = FAULTS[fault]
    for name, keys in archives.items():
        samples = []
        for key, changes in keys:
            members = sample(key, 0)
            for extension, content in changes.items():
                members.pop(f"{key}.{extension}", None)
                if content is not None:
                    is_size = isinstance(content, tuple)
                    members[f"{key}.{extension}"] = jpeg(pixels(0, content)) if is_size else content
            samples.append(members)
        write(tmp_path / name, samples)
    with user_error(*shown):
        adopt(tmp_path, "others", workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(archives)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(kind, sample, tmp_path, user_error):
    path = write(tmp_path / "train-0.tar", [sample("a", 0)])
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("b.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with user_error(path, "b.jpg"):
        adopt(tmp_path, "others", workers=1)


def test_names_that_point_elsewhere_are_only_names(sample, tmp_path):
    """Nothing is extracted: a member is found by its offset."""
    write(tmp_path / "train-0.tar", [sample("../../etc/passwd", 0), sample("/absolute/x", 1, seed=1)])
    manifest = adopt(tmp_path, "others", workers=1)
    assert np.array_equal(
        Split(tmp_path, manifest, "train").read(np.array([1]))[0],
        np.asarray(Image.open(io.BytesIO(sample("x", 1, seed=1)["x.jpg"]))),
    )


def test_a_shard_that_is_cut_off_anywhere_is_named(sample, tmp_path):
    whole = write(tmp_path / "whole.tar", [sample(f"s{i}", i, i) for i in range(3)]).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512 + 1024  # content, then the two blocks that end an archive
    path = tmp_path / "train-0.tar"
    for size in (*range(0, end, 5), *range(0, end, 512), end - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"train-0\.tar"):
            _read(None, path)
    path.write_bytes(whole[:end])
    assert _read(None, path)[1].shard.samples == 3


def test_class_names_that_are_too_few_are_refused(folder, user_error):
    with user_error("label 4", "3 class names"):
        adopt(folder, "others", ["a", "b", "c"], workers=1)
