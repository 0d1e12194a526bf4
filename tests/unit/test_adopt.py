"""Shards that others wrote: read where they lie, equal to what stock webdataset reads; damaged ones by name."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from dlops_dist.data.adopt import _read, adopt, read_class_names
from dlops_dist.data.inspection import counts_by_class, doubts
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
    write(
        tmp_path / "imagenet-val-00.tar",
        [sample(f"v{i}", i, 30 + i, txt=b"words") for i in range(4)],
    )
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
    with wds.TarWriter(str(tmp_path / "test-0.tar"), encoder=False) as sink:
        sink.write({"__key__": "t", "npy": raw(8), "cls": b"0"})
    manifest = adopt(tmp_path, "others", ["a", "b", "c"], workers=1)
    assert (manifest.extension, manifest.splits) == ("npy", {"train": 3, "test": 1, "unlabeled": 1})
    train, unlabeled = (Split(tmp_path, manifest, name) for name in ("train", "unlabeled"))
    assert np.array_equal(train.read(np.array([2])), pixels(2)[None])
    assert (train.labels.tolist(), unlabeled.labels.tolist()) == ([0, 1, 2], [-1])
    assert train.keys_of(np.arange(1))[0].startswith("longlong")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("imagenet-pretrained-val-000.tar", "test"), ("constrained-test-0.tar", "test"), ("latest_train.tar", "train"),
        ("TRAIN-1.tar", "train"), ("stl-unlabeled-2.tar", "unlabeled"),
    ],
)  # fmt: skip
def test_whole_words_of_a_name_tell_the_split(name, split, sample, tmp_path):
    path = write(tmp_path / name, [sample("a", 0)])
    assert _read([], path)[1].shard.split == split


def test_shards_of_val_and_of_test_are_not_mixed(folder, sample, user_error):
    write(folder / "imagenet-test-00.tar", [sample("t", 0)])
    with user_error(folder, "val", "test"):
        adopt(folder, "others", workers=1)


def test_what_was_packed_here_keeps_its_manifest(shapes_shards, tmp_path, user_error):
    shards = shutil.copytree(shapes_shards, tmp_path / "shards")
    before = (shards / "manifest.json").read_bytes()
    with user_error(shards, "dlops_dist.shard"):
        adopt(shards, "others", workers=1)
    assert (shards / "manifest.json").read_bytes() == before


def test_files_without_an_ending_and_those_that_systems_leave_are_passed_over(folder, sample):
    litter = ("._a.jpg", "n01/._a.jpg", "__MACOSX/n01/._a.jpg", ".DS_Store", "n01/Thumbs.db", "desktop.ini")
    members = {"README": b"words", **dict.fromkeys(litter, b"\0"), **sample("__a", 0), "LICENSE": b"more"}
    path = write(folder / "imagenet-train-00.tar", [members])
    (folder / f"._{path.name}").write_bytes(b"a Mac's")
    assert adopt(folder, "others", workers=1).splits == {"train": 7, "test": 4}


def as_lists(folder):
    """Keys, labels and pixels of what is trained on."""
    split = Split(folder, read_manifest(folder), "train")
    return split.keys_of(np.arange(len(split))), split.labels.tolist(), split.read(np.arange(len(split))).tolist()


def test_archives_joined_by_cat_are_read_to_the_last(folder, sample):
    samples = [sample(f"s{i}", i % 5, i) for i in range(9)]
    path = write(folder / "imagenet-train-00.tar", samples)
    adopt(folder, "others", workers=1)
    expected = as_lists(folder)
    pieces = [samples[:4], samples[4:5], [], samples[5:], []]
    joined = b"".join(write(folder / "piece", piece).read_bytes() for piece in pieces)
    for content in (joined, joined + bytes(5000)):
        path.write_bytes(content)
        adopt(folder, "others", workers=1)
        assert as_lists(folder) == expected


def test_what_follows_an_archive_and_is_none_is_named(sample, tmp_path, user_error):
    path = write(tmp_path / "train-0.tar", [sample("a", 0)])
    whole = path.read_bytes()
    for more in (b"\1", b"garbage" * 1000, whole[:300], whole[:700], bytes(512) + whole[512:]):
        path.write_bytes(whole + more)
        with user_error(path):
            _read([], path)


def test_members_of_a_sample_may_stand_apart(folder, sample):
    adopt(folder, "others", workers=1)
    expected = as_lists(folder)
    for path in folder.glob("*train*.tar"):
        with tarfile.open(path) as archive:
            members = [(info.name, archive.extractfile(info).read()) for info in archive]
        write(path, [dict(sorted(members, key=lambda member: member[0].endswith(".cls")))])
    adopt(folder, "others", workers=1)
    assert as_lists(folder) == expected


WRITTEN = {
    "cls": [b"2", b" 2\r\n", b"\xef\xbb\xbf2", b"dog"],
    "CLS": [b"2"],
    "txt": [b"2\n", b"dog"],
    "json": [b'{"label": 2}', b'{"label": 2.0}', b'{"label": "dog"}', b'{"label": null, "class": 2}', b'{"cls": "2"}'],
}


@pytest.mark.parametrize(("ending", "content"), [(ending, c) for ending, all_of in WRITTEN.items() for c in all_of])
def test_labels_are_read_however_they_are_written(ending, content, jpeg, tmp_path):
    path = write(tmp_path / "train-0.tar", [{"a.JPG": jpeg(pixels(0)), f"a.{ending}": content}])
    assert _read(["cat", "x", "dog", "x"], path)[1].columns["label"] == [2]


def test_further_images_of_a_sample_are_passed_over(sample, tmp_path):
    path = write(tmp_path / "train-0.tar", [sample("a", 2, **{"mask.png": b"?", "left.jpg": b"?"})])
    assert _read([], path)[1].columns["label"] == [2]


def test_captions_are_no_labels(jpeg, tmp_path):
    path = write(tmp_path / "unlabeled-0.tar", [{"a.jpg": jpeg(pixels(0)), "a.txt": b"7"}])
    assert _read([], path)[1].columns["label"] == [-1]


FAULTS = {
    "no tar at all": ({}, ["no .tar files"]),
    "no split in the name": ({"data-0.tar": [("a", {})]}, ["data-0.tar", "train"]),
    "an odd name": ({"train 0.tar": [("a", {})]}, ["train 0.tar", "letters"]),
    "no training shard": ({"test-0.tar": [("a", {})]}, ["train"]),
    "no test shard": ({"train-0.tar": [("a", {})], "test-0.tar": []}, ["'val' or 'test'"]),
    "no sample in train": ({"train-0.tar": []}, ["'train'"]),
    "no label": ({"train-0.tar": [("a", {"cls": None})]}, ["train-0.tar", "a", "no label"]),
    "a json without label": ({"train-0.tar": [("a", {"cls": None, "json": b"{}"})]}, ["train-0.tar", "a", "no label"]),
    "a json that is a list": ({"train-0.tar": [("a", {"cls": None, "json": b"[1]"})]}, ["train-0.tar", "no label"]),
    "a label of a half": ({"train-0.tar": [("a", {"cls": None, "json": b'{"label": 1.5}'})]}, ["a", "'1.5'"]),
    "a png": ({"train-0.tar": [("a", {"jpg": None, "png": b""})]}, ["a.png", "neither jpg nor npy", "shard folder"]),
    "dots in names": ({"train-0.tar": [("x", {}), ("a.b", {})]}, ["train-0.tar: a.b.jpg has a dot in its name"]),
    "a dot in one name": ({"train-0.tar": [("a", {}), ("a.b", {})]}, ["train-0.tar: a.b.jpg has a dot in its name"]),
    "another size elsewhere": (
        {"train-0.tar": [("a", {})], "train-1.tar": [("b", {"jpg": (9, 9)})]},
        ["train-1.tar: b", "(9, 9, 3)", "--size"],
    ),
    "a name of several splits": ({"train-val-0.tar": [("a", {})]}, ["train-val-0.tar", "test and train"]),
    "an ending in capitals": ({"train-0.TAR": [("a", {})]}, ["mv", "train-0.TAR", "train-0.tar"]),
    "a label that is a word": (
        {"train-0.tar": [("a", {"cls": b"cat"})]},
        ["train-0.tar", "a", "'cat'", "--class-names"],
    ),
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
    archives = archives and {"test-0.tar": [("t", {})]} | archives
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
def test_links_and_devices_are_refused(kind, folder, sample, user_error):
    path = write(folder / "imagenet-train-00.tar", [sample("a", 0)])
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("b.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with user_error(path, "b.jpg", *["--hard-dereference"] * (kind in (tarfile.SYMTYPE, tarfile.LNKTYPE))):
        adopt(folder, "others", workers=1)


COMPRESSIONS = {"gunzip": (gzip.compress, "gz"), "bunzip2": (bz2.compress, "bz2"), "unxz": (lzma.compress, "xz")}


@pytest.mark.parametrize("unpack", COMPRESSIONS)
@pytest.mark.parametrize("named", ["tar", "what it is"])
def test_compressed_shards_are_named_with_the_command_that_unpacks_them(named, unpack, folder, user_error):
    if shutil.which(unpack) is None:
        pytest.skip(f"{unpack} is not on this machine")
    compress, ending = COMPRESSIONS[unpack]
    adopt(folder, "others", workers=1)
    before = read_manifest(folder)
    for path in folder.glob("*.tar"):
        packed = compress(path.read_bytes())
        path.unlink()
        path.with_name(path.name + f".{ending}" * (named != "tar")).write_bytes(packed)
    for _ in range(3 if named == "tar" else 1):
        with pytest.raises(UserError, match="compressed") as caught:
            adopt(folder, "others", workers=1)
        subprocess.run(str(caught.value).rpartition(": ")[2], shell=True, check=True)
    assert adopt(folder, "others", workers=1) == before


def test_shards_in_folders_are_named_with_the_command_that_moves_them(folder):
    for split in ("train", "val"):
        (folder / split).mkdir()
        for path in folder.glob(f"*{split}*.tar"):
            path.rename(folder / split / path.name.rpartition("-")[2])
    with pytest.raises(UserError, match="only in its folders") as caught:
        adopt(folder, "others", workers=1)
    subprocess.run(str(caught.value).rpartition(": ")[2].removesuffix(", and so on"), shell=True, check=True)
    assert (folder / "train-00.tar").is_file()


def test_a_packed_shard_beside_its_unpacked_self_is_passed_over(folder):
    before = adopt(folder, "others", workers=1)
    (folder / "imagenet-train-00.tar.gz").write_bytes(b"")
    assert adopt(folder, "others", workers=1) == before


def test_names_that_point_elsewhere_are_only_names(sample, tmp_path):
    """Nothing is extracted: a member is found by its offset."""
    write(tmp_path / "train-0.tar", [sample("../../etc/passwd", 0), sample("/absolute/x", 1, seed=1)])
    write(tmp_path / "test-0.tar", [sample("t", 0)])
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
            _read([], path)
    path.write_bytes(whole[:end])
    assert _read([], path)[1].shard.samples == 3


def test_class_names_that_are_too_few_are_refused(folder, user_error):
    with user_error("label 4", "3 class names"):
        adopt(folder, "others", ["a", "b", "c"], workers=1)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("ends", [0, 1, 3])
def test_class_names_are_read_without_mark_and_blank_lines(ends, line_end, encoding, tmp_path):
    mark = "\ufeff" * (encoding == "utf-16-be")
    path = tmp_path / "names.txt"
    path.write_bytes(f"{mark}Tench{line_end}Großer Hai{line_end * ends}".encode(encoding))
    assert read_class_names(path) == ["Tench", "Großer Hai"]


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (b"a\nHai \xdf\n", ["line 2", "not UTF-8"]), (b"", ["each line"]), (b"\n\n", ["each line"]),
        (b"a\n\nb\n", ["each line", "line 2"]), (b"a\nb\0c\n", ["each line", "line 2"]), (None, ["No such file"]),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_class_names_is_named(content, shown, tmp_path, user_error):
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    with user_error(f"--class-names {path}", *shown):
        read_class_names(path)


DOUBTS = {
    "none": ([0, 1, 2, 0, 1, 2], None, []),
    "few samples": ([0, 1, 2], None, ["3 training samples", "--global-batch-size 3"]),
    "labels from 1": ([1, 2, 3, 1, 2, 3], None, ["1 of 4 classes", "count from 1?"]),
    "sparse labels": ([7, 950, 7, 950, 7, 7], None, ["949 of 951 classes", "0, 1, 2, 3, 4, ..."]),
    "more names than labels": ([0, 1, 0, 1, 0, 1], ["a", "b", "c"], ["1 of 3 classes", ": c"]),
    "one class": ([0] * 6, ["cat"], ["one class, cat"]),
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_what_training_would_stumble_over_is_said(doubt, sample, tmp_path):
    labels, names, shown = DOUBTS[doubt]
    write(tmp_path / "train-0.tar", [sample(f"s{i}", label, i) for i, label in enumerate(labels)])
    write(tmp_path / "test-0.tar", [sample("t", labels[0])])
    manifest = adopt(tmp_path, "others", names, workers=1)
    found = doubts(counts_by_class(tmp_path, manifest), manifest.classes, global_batch_size=6)
    assert len(found) == bool(shown)
    assert all(part in found[0] for part in shown)


def test_classes_of_an_open_set_that_only_its_test_has_are_no_doubt(sample, tmp_path):
    write(tmp_path / "train-0.tar", [sample(f"s{i}", i % 2) for i in range(6)])
    write(tmp_path / "test-0.tar", [sample(f"t{i}", 2 + i % 2) for i in range(4)])
    manifest = adopt(tmp_path, "others", ["a", "b", "c", "d", "e"], workers=1)
    (doubt,) = doubts(counts_by_class(tmp_path, manifest), manifest.classes, global_batch_size=6)
    assert doubt == "1 of 5 classes have no training sample: e"


def test_shards_without_an_index_are_named_with_the_command_that_writes_it(folder, user_error):
    with user_error(folder, f"dlops_dist.shard index {folder}"):
        read_manifest(folder)
