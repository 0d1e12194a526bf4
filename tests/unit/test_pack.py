"""Shards: the same bytes whoever packs, readable by stock tools, whole or not there; random access to the images."""

import hashlib
import io
import json
import os
import tarfile
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dlops_dist.data import index as index_module
from dlops_dist.data import pack as pack_module
from dlops_dist.data.images import decode
from dlops_dist.data.pack import pack
from dlops_dist.data.shards import Split, read_manifest
from dlops_dist.data.sources import STL10, Listing, TinyImageNet
from dlops_dist.files import sha256_of

SHARDS = [f"{split}-{i:06d}.tar" for split in ("test", "train") for i in range(3)]


class Images:
    """A source in memory: {split: [(key, label, bytes), ...]}."""

    extension = "jpg"
    path = Path("memory")
    classes: ClassVar = ["a", "b"]

    def __init__(self, samples: dict[str, list[tuple[str, int, bytes]]]) -> None:
        self.samples = samples
        self.splits = {
            split: Listing([key for key, _, _ in rows], np.array([label for _, label, _ in rows], np.int64))
            for split, rows in samples.items()
        }

    def read(self, split: str, index: int) -> bytes:
        return self.samples[split][index][2]

    def name(self, split: str, index: int) -> str:
        return f"{split}/{self.samples[split][index][0]}"

    def stamp(self) -> str:
        return ""


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pil_pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def listed(source) -> dict[str, dict[str, tuple[int, bytes]]]:
    """{split: {key: (label, bytes)}}."""
    return {
        split: {k: (int(y), source.read(split, i)) for i, (k, y) in enumerate(zip(*listing[:2], strict=True))}
        for split, listing in source.splits.items()
    }


def index_of(folder: Path) -> pd.DataFrame:
    """The index, with the names of the shards."""
    index = pd.read_parquet(folder / "index.parquet")
    names = [shard["name"] for shard in json.loads((folder / "manifest.json").read_text())["shards"]]
    return index.assign(file=[names[i] for i in index["shard"]])


@pytest.fixture
def source(tiny_zip):
    return TinyImageNet(tiny_zip)


@pytest.fixture
def packed(source, tmp_path) -> Path:
    """12 training and 12 test images in shards of 5."""
    pack(source, tmp_path / "packed", "tiny", shard_size=5, workers=1)
    return tmp_path / "packed"


# the same bytes


def test_one_process_and_two_write_the_same_bytes(source, packed, tmp_path):
    told = []
    pack(source, tmp_path / "two", "tiny", shard_size=5, workers=2, on_progress=lambda *done: told.append(done))
    assert files(tmp_path / "two") == files(packed)
    assert told == [(5, 24), (10, 24), (12, 24), (17, 24), (22, 24), (24, 24)]


def test_an_unpacked_folder_elsewhere_gives_the_same_bytes(packed, tiny_files, write_folder, tmp_path):
    source = TinyImageNet(write_folder(tmp_path / "unpacked", tiny_files))
    pack(source, tmp_path / "deep" / "again", "tiny", shard_size=5, workers=1)
    assert files(tmp_path / "deep" / "again") == files(packed)


def test_another_seed_orders_samples_otherwise_and_keeps_them_all(source, packed, tmp_path):
    pack(source, tmp_path / "other", "tiny", seed=1, shard_size=5, workers=1)
    first, other = index_of(packed), index_of(tmp_path / "other")
    assert first["key"].tolist() != other["key"].tolist()
    assert sorted(first["key"]) == sorted(other["key"])


def test_a_split_is_not_packed_in_the_order_of_its_classes(tmp_path, jpeg):
    data = jpeg(np.zeros((8, 8), np.uint8))
    pack(Images({"train": [(f"{i:03d}", i // 50, data) for i in range(100)]}), tmp_path, "two", workers=1)
    labels = index_of(tmp_path)["label"].to_numpy()
    assert abs(labels[:50].sum() - 25) < 5 * 2.5


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.fixed_dictionaries({"train": st.integers(1, 9)}, optional={"test": st.integers(1, 9)}),
    shard_size=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_every_sample_stands_in_exactly_one_shard(sizes, shard_size, seed, tmp_path_factory, jpeg):
    out, data = tmp_path_factory.mktemp("packed"), jpeg(np.zeros((8, 8), np.uint8))
    source = Images({split: [(f"{split}{i}", i % 2, data) for i in range(n)] for split, n in sizes.items()})
    manifest = pack(source, out, "any", seed, shard_size, workers=1)
    index = index_of(out)
    assert sorted(index["key"]) == sorted(f"{split}{i}" for split, n in sizes.items() for i in range(n))
    assert manifest.splits == sizes
    for shard in manifest.shards:
        keys = index["key"][index["file"] == shard.name]
        assert shard.samples == len(keys) <= shard_size
        assert all(key.startswith(shard.split) for key in keys)
    fewest = {split: -(-n // shard_size) for split, n in sizes.items()}
    assert [s.name for s in manifest.shards] == [
        f"{split}-{i:06d}.tar" for split in sizes for i in range(fewest[split])
    ]


# what is written


def test_a_complete_folder_holds_manifest_index_and_shards(packed):
    assert sorted(files(packed)) == ["index.parquet", "manifest.json", *SHARDS]


def test_stock_webdataset_reads_the_shards(source, packed):
    for split, samples in listed(source).items():
        shards = sorted(str(path) for path in packed.glob(f"{split}-*.tar"))
        read = list(wds.WebDataset(shards, shardshuffle=False))
        assert {s["__key__"]: (int(s["cls"]), s["jpg"]) for s in read} == samples
        assert len(read) == len(samples)
        for image, label in wds.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("jpg", "cls"):
            assert image.shape == (16, 16, 3)
            assert label in (0, 1, 2)


def test_tarfile_finds_members_without_owner_or_time(source, packed):
    samples = listed(source)
    for name in SHARDS:
        with tarfile.open(packed / name, "r:") as tar:
            members = tar.getmembers()
            for image, label in zip(members[::2], members[1::2], strict=True):
                key = image.name.removesuffix(".jpg")
                wanted_label, wanted_bytes = samples[name.split("-")[0]][key]
                assert (image.name, label.name) == (f"{key}.jpg", f"{key}.cls")
                assert tar.extractfile(image).read() == wanted_bytes
                assert tar.extractfile(label).read() == str(wanted_label).encode()
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
        assert all(m.isreg() for m in members)


def test_the_index_points_at_the_images(source, packed):
    index, samples = index_of(packed), listed(source)
    assert index.columns.tolist() == ["key", "shard", "offset", "size", "crc32", "label", "folds", "file"]
    assert len(index) == 24
    for row in index.itertuples():
        label, data = samples[row.file.split("-")[0]][row.key]
        assert (packed / row.file).read_bytes()[row.offset : row.offset + row.size] == data
        assert (row.crc32, row.label, row.folds) == (zlib.crc32(data), label, 0)


def test_the_manifest_tells_what_is_there(source, packed):
    manifest = json.loads((packed / "manifest.json").read_text())
    assert manifest.keys() == {
        "format", "dataset", "packing", "extension", "height", "width",
        "mean", "std", "classes", "num_folds", "splits", "shards", "index_sha256",
    }  # fmt: skip
    assert manifest["dataset"] == "tiny"
    assert manifest["packing"] == {"seed": 0, "shard_size": 5}
    assert manifest["classes"] == ["n01 cat", "n02 dog", "n03"]
    assert manifest["splits"] == {"train": 12, "test": 12}
    assert (manifest["height"], manifest["width"], manifest["extension"]) == (16, 16, "jpg")
    assert sorted(shard["name"] for shard in manifest["shards"]) == SHARDS
    for shard in manifest["shards"]:
        content = (packed / shard["name"]).read_bytes()
        assert sorted(shard) == ["bytes", "name", "samples", "sha256", "split"]
        assert (shard["bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert manifest["index_sha256"] == hashlib.sha256((packed / "index.parquet").read_bytes()).hexdigest()


def test_mean_and_std_are_those_of_the_training_pixels(source, packed):
    train = np.stack([pil_pixels(data) for _, data in listed(source)["train"].values()]) / 255
    manifest = read_manifest(packed)
    assert np.allclose(manifest.mean, train.mean(axis=(0, 1, 2)), rtol=0, atol=1e-12)
    assert np.allclose(manifest.std, train.std(axis=(0, 1, 2)), rtol=0, atol=1e-12)


def test_no_file_names_the_machine(packed, tmp_path):
    for content in files(packed).values():
        assert str(tmp_path).encode() not in content
    assert pq.read_metadata(packed / "index.parquet").metadata.keys() <= {b"ARROW:schema"}


def test_the_id_follows_the_content(*, source, packed, tiny_files, write_zip, jpeg, tmp_path):
    assert pack(source, tmp_path / "again", "tiny", shard_size=5, workers=1).id == read_manifest(packed).id
    tiny_files["train/n01/images/n01_0.JPEG"] = jpeg(np.zeros((16, 16), np.uint8))
    changed = TinyImageNet(write_zip(tmp_path / "changed.zip", tiny_files))
    assert pack(changed, tmp_path / "changed", "tiny", shard_size=5, workers=1).id != read_manifest(packed).id


def test_unlabeled_images_have_no_cls(stl10, tmp_path):
    pack(STL10(stl10), tmp_path / "packed", "stl10", workers=1)
    with tarfile.open(tmp_path / "packed" / "unlabeled-000000.tar") as tar:
        assert sorted(tar.getnames()) == [f"unlabeled-{i:06d}.npy" for i in range(3)]
    read = list(wds.WebDataset(str(tmp_path / "packed" / "train-000000.tar"), shardshuffle=False).decode())
    labels = {s["__key__"]: s["cls"] for s in read}
    assert labels == {f"train-{i:06d}": label for i, label in enumerate([0, 1, 2, 0, 1])}
    assert all(s["npy"].shape == (96, 96, 3) for s in read)


# interrupted and repeated


class KilledError(Exception):
    pass


def kill_after(samples: int):
    def on_progress(done: int, total: int) -> None:
        if done >= samples:
            raise KilledError

    return on_progress


@pytest.mark.parametrize("samples", [5, 12, 24])
def test_a_killed_packing_leaves_no_manifest_and_goes_on_to_the_same_bytes(samples, source, packed, tmp_path):
    out = tmp_path / "killed"
    with pytest.raises(KilledError):
        pack(source, out, "tiny", shard_size=5, workers=1, on_progress=kill_after(samples))
    assert not (out / "manifest.json").exists()
    pack(source, out, "tiny", shard_size=5, workers=1)
    assert files(out) == files(packed)


def test_packing_over_garbage_gives_the_same_bytes(source, packed, tmp_path):
    out = tmp_path / "killed"
    with pytest.raises(KilledError):
        pack(source, out, "tiny", shard_size=5, workers=1, on_progress=kill_after(12))
    (out / "train-000000.tar").write_bytes(b"garbage")
    (out / "train-000001.tar").write_bytes((packed / "train-000001.tar").read_bytes()[:-512])
    (out / "train-000009.tar").write_bytes(b"left by nobody knows whom")
    for name in (".train-000002.tar.partial", ".index.parquet.partial", ".manifest.json.partial"):
        (out / name).write_bytes(b"half")
    pack(source, out, "tiny", shard_size=5, workers=1)
    assert files(out) == files(packed)


def test_shards_of_a_killed_packing_that_are_whole_are_not_written_again(source, tmp_path):
    with pytest.raises(KilledError):
        pack(source, tmp_path, "tiny", shard_size=5, workers=1, on_progress=kill_after(24))
    (tmp_path / "train-000001.tar").write_bytes(b"garbage")
    for name in SHARDS:
        os.utime(tmp_path / name, (0, 0))
    pack(source, tmp_path, "tiny", shard_size=5, workers=1)
    assert [name for name in SHARDS if (tmp_path / name).stat().st_mtime] == ["train-000001.tar"]


def test_packing_something_else_into_the_same_folder_leaves_nothing_of_the_first(source, packed, tmp_path):
    settings_of_other = {"dataset": "tiny", "seed": 3, "shard_size": 7, "workers": 1}
    pack(source, packed, **settings_of_other)
    pack(source, tmp_path / "fresh", **settings_of_other)
    assert files(packed) == files(tmp_path / "fresh")


def test_what_another_completed_a_moment_ago_is_not_packed_again(source, packed, user_error):
    for name in SHARDS:
        os.utime(packed / name, (0, 0))
    manifest = pack(source, packed, "tiny", shard_size=5, workers=1, again=False)
    assert manifest == read_manifest(packed)
    with user_error(packed, "--shard-size 5", "--again"):
        pack(source, packed, "tiny", shard_size=7, workers=1, again=False)
    assert not any((packed / name).stat().st_mtime for name in SHARDS)


def test_a_packing_that_fails_over_a_complete_one_leaves_no_manifest(source, packed):
    with pytest.raises(KilledError):
        pack(source, packed, "tiny", shard_size=5, workers=1, on_progress=kill_after(1))
    assert not (packed / "manifest.json").exists()


def test_a_strangers_shards_are_not_touched(source, tmp_path, user_error):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train-000777.tar").write_bytes(b"somebody's")
    with user_error(out, "train-000777.tar", "--out"):
        pack(source, out, "tiny", shard_size=5, workers=1)
    assert files(out) == {"train-000777.tar": b"somebody's"}


@pytest.mark.parametrize("content", [b"{", b'{"format": 1}'])
def test_shards_whose_manifest_cannot_be_read_can_be_packed_again(content, source, packed, tmp_path):
    expected = files(packed)
    (packed / "manifest.json").write_bytes(content)
    pack(source, packed, "tiny", shard_size=5, workers=1)
    assert files(packed) == expected


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 4])
def test_a_packing_of_something_else_that_is_killed_at_its_beginning_loses_nothing(kept, source, tmp_path, monkeypatch):
    """Killed at each of its first changes to the folder, then called again, either way round."""
    settings = [{"dataset": "tiny", "seed": seed, "shard_size": 7, "workers": 1} for seed in (0, 3)]
    with pytest.raises(KilledError):
        pack(source, tmp_path / "out", **settings[0], on_progress=kill_after(8))
    changes = iter(range(kept))

    def limited(call):
        def change(*arguments, **options):
            if next(changes, None) is None:
                raise KilledError
            return call(*arguments, **options)

        return change

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", limited(Path.unlink))
        patch.setattr(pack_module, "write_file", limited(pack_module.write_file))
        with pytest.raises(KilledError):
            pack(source, tmp_path / "out", **settings[1])
    for own in settings:
        pack(source, tmp_path / "out", **own)
        pack(source, tmp_path / f"fresh {own['seed']}", **own)
        assert files(tmp_path / "out") == files(tmp_path / f"fresh {own['seed']}")


@pytest.mark.parametrize("other", [{"limit": 6}, {"size": 7}])
def test_a_killed_packing_leaves_nothing_to_one_of_other_images(other, source, tmp_path):
    settings = {"dataset": "tiny", "shard_size": 3, "workers": 1}
    with pytest.raises(KilledError):
        pack(source, tmp_path / "out", **settings, on_progress=kill_after(8))
    pack(source, tmp_path / "out", **settings, **other)
    pack(source, tmp_path / "fresh", **settings, **other)
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_packing_beside_the_archive_keeps_the_archive(tiny_zip):
    pack(TinyImageNet(tiny_zip), tiny_zip.parent, "tiny", workers=1)
    assert tiny_zip.is_file()


# images that cannot be packed


def images_with(jpeg, key: str, data: bytes) -> Images:
    good = [(f"good-{i}", i % 2, jpeg(np.full((8, 8, 3), i, np.uint8))) for i in range(5)]
    return Images({"train": [*good, (key, 0, data)]})


@pytest.mark.parametrize("shard_size", [1, 100], ids=["own shard", "same shard"])
@pytest.mark.parametrize("fault", ["no image", "empty", "cut off", "other size", "long key"])
def test_an_image_that_cannot_be_packed_is_named(fault, shard_size, tmp_path, jpeg, user_error):
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    data = {"no image": b"text", "empty": b"", "cut off": jpeg(noise)[:-60], "other size": jpeg(noise[:7])}
    key = "k" * 97 if fault == "long key" else "bad"
    with user_error(key):
        pack(images_with(jpeg, key, data.get(fault, jpeg(noise))), tmp_path, "bad", shard_size=shard_size, workers=1)
    assert not (tmp_path / "manifest.json").exists()


def test_all_bad_images_are_named_at_once_or_left_out(tmp_path, jpeg, user_error):
    good = [(f"good-{i}", i % 2, jpeg(np.full((8, 8, 3), i, np.uint8))) for i in range(6)]
    bad = [("empty", 0, b""), ("page", 1, b"<!DOCTYPE html>"), ("cut", 0, good[0][2][:-60])]
    source = Images({"train": [*good, *bad], "test": [("other", 0, b"text"), *good[:2]]})
    with user_error("memory: 4 images cannot be packed", "train/empty (it is empty)", "train/page", "<!DOCTY",
                    "train/cut", "unreadable JPEG", "test/other", "--skip-bad"):  # fmt: skip
        pack(source, tmp_path / "out", "bad", shard_size=3, workers=1)
    assert not (tmp_path / "out" / "manifest.json").exists()
    notes = []
    manifest = pack(source, tmp_path / "out", "bad", shard_size=3, workers=1, skip_bad=True, on_note=notes.append)
    assert manifest.splits == {"train": 6, "test": 2}
    assert sorted(manifest.skipped) == ["test/other", "train/cut", "train/empty", "train/page"]
    assert notes[0].startswith("memory: 4 images left out: ")
    assert read_manifest(tmp_path / "out") == manifest
    whole = Images({"train": good, "test": good[:2]})
    found = Split(tmp_path / "out", manifest, "train")
    pack(whole, tmp_path / "whole", "bad", workers=1)
    wanted = Split(tmp_path / "whole", read_manifest(tmp_path / "whole"), "train")
    ids = np.arange(6)
    images = [dict(zip(split.keys_of(ids), split.read(ids), strict=True)) for split in (found, wanted)]
    assert all(np.array_equal(images[0][key], images[1][key]) for key in images[1])
    assert (manifest.mean, manifest.std) == (wanted.manifest.mean, wanted.manifest.std)
    with user_error("2 images cannot be packed"):
        pack(Images({"train": bad[:2]}), tmp_path / "none", "bad", workers=1, skip_bad=True)


def test_many_bad_images_are_listed_in_a_file(tmp_path, jpeg, user_error):
    good = [(f"good-{i}", i % 2, jpeg(np.full((8, 8, 3), i, np.uint8))) for i in range(5)]
    source = Images({"train": [*good, *((f"bad-{i}", 0, b"") for i in range(30))]})
    with user_error("30 images cannot be packed", "train/bad-", tmp_path / "out-bad.txt"):
        pack(source, tmp_path / "out", "bad", workers=1)
    assert len((tmp_path / "out-bad.txt").read_text().splitlines()) == 30


def test_a_source_without_training_images_is_refused(tmp_path, jpeg, user_error):
    with user_error("training images"):
        pack(Images({"test": [("a", 0, jpeg(np.zeros((8, 8), np.uint8)))]}), tmp_path, "bad", workers=1)
    assert not (tmp_path / "manifest.json").exists()


def test_the_longest_key_that_fits_is_packed(tmp_path, jpeg):
    key = "k" * 96
    pack(images_with(jpeg, key, jpeg(np.zeros((8, 8), np.uint8))), tmp_path, "long", workers=1)
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        assert {f"{key}.jpg", f"{key}.cls"} <= set(tar.getnames())


def test_an_unreadable_image_is_named_by_packing_processes_too(tiny_files, write_zip, tmp_path, user_error):
    tiny_files["train/n02/images/n02_2.JPEG"] = b"text"
    source = TinyImageNet(write_zip(tmp_path / "bad.zip", tiny_files))
    with user_error("n02_2"):
        pack(source, tmp_path / "packed", "bad", shard_size=5, workers=2)
    assert not (tmp_path / "packed" / "manifest.json").exists()


# reading


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    grey=st.booleans(),
    options=st.fixed_dictionaries({"quality": st.integers(5, 100), "progressive": st.booleans()}),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    seed=st.integers(0, 99),
)
def test_decoding_equals_pil_bit_for_bit(*, size, grey, options, subsampling, seed, jpeg):
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    data = jpeg(noise[..., 0], **options) if grey else jpeg(noise, subsampling=subsampling, **options)
    assert np.array_equal(decode(data, "jpg"), pil_pixels(data))
    out = np.zeros((*size, 3), np.uint8)
    assert decode(data, "jpg", out) is out
    assert np.array_equal(out, pil_pixels(data))


def test_a_split_reads_every_image_as_pil_does(source, packed):
    manifest = read_manifest(packed)
    for name, samples in listed(source).items():
        split, index = Split(packed, manifest, name), index_of(packed)
        keys = index["key"][index["file"].str.startswith(name)].tolist()
        assert len(split) == 12
        assert split.labels.tolist() == [samples[key][0] for key in keys]
        ids = np.array([7, 0, 11, 7, 3])
        images = split.read(ids)
        assert images.dtype == np.uint8
        for image, i in zip(images, ids, strict=True):
            assert np.array_equal(image, pil_pixels(samples[keys[i]][1]))
        assert split.read(np.array([], np.int64)).shape == (0, 16, 16, 3)


def test_a_split_of_raw_images(stl10, tmp_path):
    source = STL10(stl10)
    pack(source, tmp_path / "packed", "stl10", shard_size=2, workers=1)
    manifest = read_manifest(tmp_path / "packed")
    for name, samples in listed(source).items():
        split = Split(tmp_path / "packed", manifest, name)
        raw = [np.load(io.BytesIO(data)) for _, data in samples.values()]
        read = split.read(np.arange(len(split)))
        assert sorted(image.tobytes() for image in read) == sorted(image.tobytes() for image in raw)
        assert sorted(split.labels) == sorted(label for label, _ in samples.values())


def test_a_split_that_is_not_there_is_named(packed, user_error):
    with user_error("'val'", "train", "test", packed):
        Split(packed, read_manifest(packed), "val")


# damage


def read_all(folder: Path) -> None:
    split = Split(folder, read_manifest(folder), "train")
    split.read(np.arange(len(split)))


def shard_of_first_image(packed: Path) -> tuple[Path, pd.Series]:
    row = index_of(packed).iloc[0]
    return packed / row["file"], row


@pytest.mark.parametrize("garbage", [b"\0", b"\xff"])
def test_a_damaged_image_in_a_shard_is_named(garbage, packed, user_error):
    path, row = shard_of_first_image(packed)
    with path.open("r+b") as file:
        file.seek(row["offset"])
        file.write(garbage * row["size"])
    with user_error(path, row["key"]):
        read_all(packed)


@pytest.mark.parametrize("garbage", [b"\0", b"\xff"])
def test_a_damaged_raw_image_in_a_shard_is_named(garbage, stl10, tmp_path, user_error):
    pack(STL10(stl10), tmp_path / "packed", "stl10", workers=1)
    path, row = shard_of_first_image(tmp_path / "packed")
    with path.open("r+b") as file:
        file.seek(row["offset"])
        file.write(garbage * 40)
    with user_error(path, row["key"]):
        read_all(tmp_path / "packed")


@pytest.mark.parametrize("length", [0, 1000, None], ids=["empty", "truncated", "missing"])
def test_a_shard_that_is_not_whole_is_named(length, packed, user_error):
    path, _ = shard_of_first_image(packed)
    content = path.read_bytes()
    path.unlink()
    if length is not None:
        path.write_bytes(content[:length])
    with user_error(path):
        read_all(packed)


def test_splits_share_one_reading_of_the_index(packed, monkeypatch):
    read = []
    monkeypatch.setattr(index_module, "sha256_of", lambda path: read.append(path) or sha256_of(path))
    splits = [Split(packed, read_manifest(packed), name) for name in ("train", "test", "train")]
    assert read == [packed / "index.parquet"]
    assert np.shares_memory(splits[0].labels, splits[2].labels)


def test_an_index_is_read_a_part_at_a_time_and_again_once_it_has_changed(packed, monkeypatch, user_error):
    whole = [Split(packed, read_manifest(packed), name) for name in ("train", "test")]
    monkeypatch.setattr(index_module, "PART", 3)
    index_module._columns.cache_clear()
    for split in whole:
        found = Split(packed, read_manifest(packed), split.name)
        for name in ("labels", "folds", "_offsets", "_sizes", "_checksums"):
            assert np.array_equal(getattr(found, name), getattr(split, name))
        ids = np.arange(len(split))
        assert np.array_equal(found.read(ids), split.read(ids))
        assert found.keys_of(ids[::-1]) == split.keys_of(ids)[::-1]
    content = bytearray((packed / "index.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (packed / "index.parquet").write_bytes(content)
    with user_error("index.parquet is missing or does not match"):
        Split(packed, read_manifest(packed), "train")


def test_an_index_that_is_not_the_manifests_is_named(packed, user_error):
    path = packed / "index.parquet"
    index = pd.read_parquet(path)
    index.assign(label=0).to_parquet(path)
    with user_error(path):
        read_all(packed)
    path.unlink()
    with user_error(path):
        read_all(packed)


UNTRUE = {
    "label is float64": lambda index: index.assign(label=index.label.astype(np.float64)),
    "keys that are no text": lambda index: index.assign(key=[b"bytes"] * len(index)),
    "shards that are not in the manifest": lambda index: index.assign(shard=index.shard + 1),
    "other numbers of samples than in the manifest": lambda index: index[1:],
    "samples that are not in the order of the shards": lambda index: index[::-1],
    "samples outside of their shards": lambda index: index.assign(offset=index.offset.max() + 10**6),
    "labels without a class": lambda index: index.assign(label=index.label.max() + 99),
    "folds that are not in the manifest": lambda index: index.assign(folds=index.folds + 1),
}


@pytest.mark.parametrize("problem", UNTRUE)
def test_an_index_that_cannot_be_true_is_refused_though_the_manifest_has_its_hash(problem, packed, user_error):
    path, manifest = packed / "index.parquet", packed / "manifest.json"
    UNTRUE[problem](pd.read_parquet(path)).to_parquet(path, index=False)
    values = json.loads(manifest.read_text())
    values["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(values))
    with user_error(path, f"is damaged ({problem}); pack the shards again"):
        read_all(packed)


@pytest.mark.parametrize("damage", ["cut off", "empty", "no field", "another field", "wrong type", "binary", "list"])
def test_a_damaged_manifest_is_named(damage, packed, user_error):
    path = packed / "manifest.json"
    content = path.read_bytes()
    values = json.loads(content)
    damaged = {
        "cut off": content[:-40],
        "empty": b"",
        "no field": json.dumps({k: v for k, v in values.items() if k != "splits"}).encode(),
        "another field": json.dumps({**values, "host": "x"}).encode(),
        "wrong type": json.dumps({**values, "height": "tall"}).encode(),
        "binary": b"\xff\xfe\0",
        "list": b"[]",
    }
    path.write_bytes(damaged[damage])
    with user_error(path):
        read_manifest(packed)


@pytest.mark.parametrize("more", [{}, {"channels": 3}], ids=["same fields", "another field"])
def test_a_manifest_of_another_format_is_named(more, packed, user_error):
    path = packed / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 3, **more}))
    with user_error(path, "format 3", "2"):
        read_manifest(packed)


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_a_manifest_is_named_with_what_to_do(there, tmp_path, user_error):
    folder = tmp_path / "stl10"
    if there:
        folder.mkdir()
    with user_error("data.shards", folder, f"python -m dlops_dist.shard stl10 --out {tmp_path}"):
        read_manifest(folder)
