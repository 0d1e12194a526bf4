"""Rubbish in everything that is read: whatever comes, it is read as far as it is right, or refused in one line.

FUZZ_EXAMPLES sets how many inputs each test tries (default 30; .ci/run tries 1,000).
"""

import contextlib
import hashlib
import io
import json
import os
import tarfile
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dlops_dist.command_line import read_settings
from dlops_dist.data.adopt import _read
from dlops_dist.data.images import decode, encode, kind_of
from dlops_dist.data.shards import Split, read_manifest
from dlops_dist.data.sources import STL10, TinyImageNet
from dlops_dist.errors import UserError

pytestmark = pytest.mark.fuzz
fuzzed = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "30")), deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


@st.composite
def damaged(draw, whole):
    """Some bytes changed, inserted or taken out; perhaps cut off."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        piece = draw(st.binary(min_size=1, max_size=12) | st.sampled_from([b"\0" * 8, b"\xff" * 8, b"9" * 11, b"-1"]))
        match draw(st.sampled_from(["change", "change", "change", "insert", "remove", "repeat"])):
            case "change":
                content[at : at + len(piece)] = piece
            case "insert":
                content[at:at] = piece
            case "remove":
                del content[at : at + draw(st.integers(1, 600))]
            case "repeat":
                content[at:at] = content[at : at + draw(st.integers(1, 600))]
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)


def tar(kind=tarfile.GNU_FORMAT):
    file, image = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels(0)).save(image, "JPEG")
    with tarfile.open(fileobj=file, mode="w", format=kind) as archive:
        for i in range(3):
            key = f"{'directory' * 12}/{i}" if i else "short"
            for name, content in ((f"{key}.jpg", image.getvalue()), (f"{key}.cls", b"%d" % i)):
                info = tarfile.TarInfo(name)
                info.size, info.pax_headers = len(content), {"comment": "x" * 20}
                archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


@fuzzed
@given(st.one_of(damaged(tar(tarfile.GNU_FORMAT)), damaged(tar(tarfile.PAX_FORMAT)), st.binary(max_size=2000)))
def test_a_foreign_shard(tmp_path, content):
    path = tmp_path / "train-0.tar"
    path.write_bytes(content)
    try:
        facts = _read([], path)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        return
    columns = facts.columns
    for offset, length, size in zip(columns["offset"], columns["size"], facts.sizes, strict=True):
        image = content[offset : offset + length]
        assert decode(image, kind_of(image)).shape[:2] == size


@pytest.fixture(scope="module")
def shards(shapes_shards):
    return {path.name: path.read_bytes() for path in shapes_shards.iterdir()}


def opened(folder, files, **changed):
    """Every image and label of the train split of a folder in which some files were changed."""
    for name, content in files.items():
        (folder / name).write_bytes(changed.get(name, content))
    split = Split(folder, read_manifest(folder), "train")
    return split.labels, split.read(np.arange(len(split)))


@fuzzed
@given(data=st.data())
def test_an_index_whose_hash_the_manifest_bears_out(shards, tmp_path, data):
    """Somebody changed the index and wrote its new hash into the manifest."""
    index = data.draw(damaged(shards["index.parquet"]))
    manifest = {**json.loads(shards["manifest.json"]), "index_sha256": hashlib.sha256(index).hexdigest()}
    files = {**shards, "index.parquet": index, "manifest.json": json.dumps(manifest).encode()}
    try:
        labels, images = opened(tmp_path, files)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert ((labels >= -1) & (labels < 10)).all()
        assert images.shape == (len(labels), 32, 32, 3)


@fuzzed
@given(data=st.data())
def test_a_manifest(shards, tmp_path, data):
    try:
        labels, images = opened(tmp_path, {**shards, "manifest.json": data.draw(damaged(shards["manifest.json"]))})
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert len(images) == len(labels)


@fuzzed
@given(data=st.data())
def test_a_shard_is_what_was_packed_or_refused(shards, tmp_path, data):
    _, expected = opened(tmp_path, shards)
    try:
        _, images = opened(tmp_path, {**shards, "train-000001.tar": data.draw(damaged(shards["train-000001.tar"]))})
    except UserError as error:
        assert "train-000001.tar" in str(error)
        assert len(str(error).splitlines()) == 1
    else:
        assert np.array_equal(images, expected)


@fuzzed
@given(st.one_of(damaged(encode(pixels(0), "jpg")), st.binary(max_size=100)))
def test_a_jpeg(content):
    with contextlib.suppress(ValueError):
        assert decode(content, "jpg").dtype == np.uint8
    out = np.empty((8, 8, 3), np.uint8)
    with contextlib.suppress(ValueError):
        assert decode(content, "jpg", out) is out


@fuzzed
@given(st.one_of(damaged(encode(pixels(0), "npy")), st.binary(max_size=100)))
def test_raw_pixels(content):
    with contextlib.suppress(ValueError):
        assert decode(content, "npy").dtype == np.uint8


CONFIG = b"""epochs: 3
name: a-run
data: {shards: "shards", threads: 2}
optimizer: # SGD
  lr: 1e-3
  nesterov: true
"""


@fuzzed
@given(st.one_of(damaged(CONFIG), st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_a_file_of_settings(tmp_path, content):
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    try:
        read_settings("q1", ["--config", str(path)])
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        assert str(error).startswith((f"{path}:", "--config"))


@fuzzed
@given(data=st.data())
def test_an_archive_of_tiny_imagenet(tiny_zip, tmp_path, data):
    path = tmp_path / "damaged.zip"
    path.write_bytes(data.draw(damaged(tiny_zip.read_bytes())))
    try:
        source = TinyImageNet(path)
        source.stamp()
        for split, listing in source.splits.items():
            for i in range(len(listing.keys)):
                source.read(split, i)
    except UserError as error:
        assert len(str(error).splitlines()) == 1


@fuzzed
@given(data=st.data())
def test_files_of_stl10(stl10, data):
    name = data.draw(st.sampled_from(["train_y.bin", "test_X.bin", "class_names.txt", "fold_indices.txt"]))
    path = stl10 / name
    whole = path.read_bytes()
    path.write_bytes(data.draw(damaged(whole) | st.binary(max_size=60)))
    try:
        source = STL10(stl10)
        assert {len(listing.keys) for listing in source.splits.values()} <= set(range(6))
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    finally:
        path.write_bytes(whole)


MEMBERS = ["../outside.txt", "/etc/absolute.txt", "tiny/../../up.txt", "..\\windows.txt"]


@pytest.mark.parametrize("name", MEMBERS)
def test_an_archive_with_members_outside_of_it_is_refused(name, tiny_zip, user_error):
    with zipfile.ZipFile(tiny_zip, "a") as archive:
        archive.writestr(name, b"?")
    with user_error(tiny_zip, "outside of the archive"):
        _ = TinyImageNet(tiny_zip).splits


def test_a_decompression_bomb_is_refused_unread(tiny_zip, user_error):
    with zipfile.ZipFile(tiny_zip, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny/train/n01/images/n01_9.JPEG", bytes(2**26 + 1))
    assert tiny_zip.stat().st_size < 2**20
    with user_error("n01_9.JPEG", "bomb"):
        _ = TinyImageNet(tiny_zip).splits
