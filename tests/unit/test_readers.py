"""The three readers give the same bits; the decoded file is built once, whole, by one process, or not at all."""

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dlops_dist import files
from dlops_dist.data import readers
from dlops_dist.data import shards as shards_module
from dlops_dist.data.loader import read_ahead
from dlops_dist.data.pack import pack
from dlops_dist.data.readers import decoded_pixels, open_readers
from dlops_dist.data.shapes import write_tiny_imagenet
from dlops_dist.data.shards import Split, read_manifest
from dlops_dist.data.sources import TinyImageNet
from dlops_dist.files import sha256_of

CPU = torch.device("cpu")


def silent(text: str) -> None:
    pass


@pytest.fixture
def split(shapes_shards):
    return Split(shapes_shards, read_manifest(shapes_shards), "train")


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize("kind", ["auto", "decode", "decoded", "device"])
def test_all_readers_give_the_same_bits(kind, split, tmp_path):
    test = Split(split._folder, split.manifest, "test")
    opened = open_readers([split, test], kind, str(tmp_path), CPU, pytest.fail, silent)
    assert opened.kind == ("decoded" if kind == "auto" else kind)
    ids = np.array([5, 0, 239, 5, 17])
    for reader, expected in zip(opened.readers, (split, test), strict=True):
        assert len(reader) == len(expected)
        assert np.array_equal(reader.labels, expected.labels)
        own = ids % len(expected)
        assert np.array_equal(np.asarray(reader.read(own)), expected.read(own))
        assert reader.read(own[:0]).shape == (0, 32, 32, 3)
    parts = [(ids[:4], slice(1, 3)), (ids[4:], slice(0, 1))]
    batches = (read_ahead(reader, parts, CPU, 2, 2) for reader in (opened.readers[0], split))
    for ours, theirs in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))


def test_the_decoded_file_is_made_once_and_mapped(split, tmp_path, monkeypatch):
    first = decoded_pixels(split, tmp_path, silent)
    assert isinstance(first, np.memmap)
    assert names(tmp_path) == [f"{split.manifest.id[:16]}-train.{end}" for end in ("pixels", "sha256")]
    assert tmp_path.stat().st_uid == os.getuid()
    monkeypatch.setattr(readers, "_write", lambda *_: pytest.fail("made again"))
    assert np.array_equal(decoded_pixels(split, tmp_path, silent), first)


def test_many_shards_take_more_descriptors_than_the_usual_limit(shapes_shards, tmp_path):
    archive = tmp_path / "shapes.zip"
    write_tiny_imagenet(archive, train_per_class=20, test_per_class=1, size=8)
    manifest = pack(TinyImageNet(archive), tmp_path / "many", "shapes", shard_size=1, workers=1)
    split = Split(tmp_path / "many", manifest, "train")
    _, most = before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, most))
    try:
        assert split.read(np.arange(200)).shape == (200, 8, 8, 3)
    finally:
        del split
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_threads_that_read_first_together_open_each_shard_once(split, monkeypatch):
    opened = []
    open_shard = shards_module._open
    monkeypatch.setattr(
        shards_module, "_open", lambda path: (opened.append(path), time.sleep(0.02), open_shard(path))[2]
    )
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(split.read, [np.array([i]) for i in range(64)]))
    assert np.array_equal(np.concatenate(images), split.read(np.arange(64)))
    assert len(opened) == len(set(opened))


@pytest.mark.parametrize("damage", ["a byte", "cut off", "another hash", "no hash"])
def test_a_decoded_file_that_is_not_what_was_written_is_made_again(damage, split, tmp_path):
    expected = np.array(decoded_pixels(split, tmp_path, silent))
    (pixels,) = tmp_path.glob("*.pixels")
    (sha256,) = tmp_path.glob("*.sha256")
    content = bytearray(pixels.read_bytes())
    content[1234] ^= 1
    match damage:
        case "a byte":
            pixels.write_bytes(content)
        case "cut off":
            os.truncate(pixels, len(content) - 1)
        case "another hash":
            sha256.write_text("0" * 64)
        case "no hash":
            sha256.unlink()
    assert np.array_equal(decoded_pixels(split, tmp_path, silent), expected)


def test_a_decoded_file_is_compared_with_its_hash_once_after_each_start_of_the_node(split, tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(readers, "sha256_of", lambda path: hashed.append(path) or sha256_of(path))
    for _ in range(3):
        decoded_pixels(split, tmp_path, silent)
    assert hashed == []
    for start in (1, 2):
        monkeypatch.setattr(readers.psutil, "boot_time", lambda start=start: float(start))
        for _ in range(3):
            decoded_pixels(split, tmp_path, silent)
        assert len(hashed) == start
    (sha256,) = tmp_path.glob("*.sha256")
    sha256.write_text(sha256.read_text().splitlines()[0])  # as earlier versions wrote it
    decoded_pixels(split, tmp_path, silent)
    assert len(hashed) == 3


def decode_in_process(shards, folder, started, results):
    started.wait()
    written = []
    write = readers._write
    readers._write = lambda *arguments: (written.append(1), write(*arguments))
    pixels = decoded_pixels(Split(shards, read_manifest(shards), "train"), folder, silent)
    results.put((len(written), int(pixels.astype(np.int64).sum())))


def test_of_many_processes_one_decodes(shapes_shards, split, tmp_path):
    context = multiprocessing.get_context("fork")
    started, results = context.Event(), context.Queue()
    processes = [
        context.Process(target=decode_in_process, args=(shapes_shards, tmp_path, started, results)) for _ in range(6)
    ]
    for process in processes:
        process.start()
    started.set()
    found = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert sum(written for written, _ in found) == 1
    assert {total for _, total in found} == {int(split.read(np.arange(len(split))).astype(np.int64).sum())}


SLOW = """
import sys, time
from pathlib import Path
from dlops_dist.data import readers
from dlops_dist.data.shards import Split, read_manifest
from dlops_dist.data.sources import TinyImageNet
from dlops_dist.files import sha256_of
shards, folder = map(Path, sys.argv[1:])
readers.BLOCK = 16
split = Split(shards, read_manifest(shards), "train")
read = split.read
split.read = lambda ids: (time.sleep(0.3), read(ids))[1]
readers.decoded_pixels(split, folder, print)
"""


def test_a_builder_that_is_killed_is_succeeded_by_one_that_waited(shapes_shards, split, tmp_path, monkeypatch):
    command = [sys.executable, "-c", SLOW, str(shapes_shards), str(tmp_path)]
    builder = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob(".*.partial")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        builder.send_signal(signal.SIGSTOP)  # it holds the lock and does nothing
        monkeypatch.setattr(files, "TELL_EVERY_S", 0.1)
        told = []

        def tell(text):
            told.append(text)
            if "waiting for another process" in text:
                builder.kill()

        pixels = decoded_pixels(split, tmp_path, tell)
    finally:
        builder.kill()
        builder.wait()
    assert "waiting for another process" in told[0]
    assert np.array_equal(pixels, split.read(np.arange(len(split))))
    assert len(names(tmp_path)) == 2


def test_a_disk_that_cannot_hold_it_falls_back_to_decoding_with_a_warning(split, tmp_path):
    warnings = []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # a file may not grow further: as on a full disk
    try:
        opened = open_readers([split], "decoded", str(tmp_path / "cache"), CPU, warnings.append, silent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert (opened.kind, opened.readers) == ("decode", [split])
    assert len(warnings) == 1
    assert str(tmp_path / "cache") in warnings[0]
    assert names(tmp_path / "cache") == []


@pytest.mark.parametrize("where", ["/proc/nowhere", "/dev/null/cache"])
def test_a_folder_that_cannot_be_made_falls_back_to_decoding_with_a_warning(where, split):
    warnings = []
    opened = open_readers([split], "decoded", where, CPU, warnings.append, silent)
    assert (opened.kind, len(warnings)) == ("decode", 1)


def test_a_damaged_sample_is_named_while_decoding_and_leaves_no_file(shapes_shards, tmp_path, user_error):
    shards = shutil.copytree(shapes_shards, tmp_path / "shards")
    path = shards / "train-000001.tar"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    split = Split(shards, read_manifest(shards), "train")
    with user_error(path, "not the bytes that were packed"):
        decoded_pixels(split, tmp_path / "cache", silent)
    assert names(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("size", "missing", "memory", "disk", "expected"),
    [
        (10, 10, 40, 40, "decoded"),
        (10, 10, 39, 99, "decode"),
        (10, 10, 99, 39, "decode"),
        (10, 0, 99, 0, "decoded"),
        (10, 5, 99, 20, "decoded"),
    ],
)
def test_auto_decodes_once_where_a_quarter_of_memory_and_disk_holds_it(
    size, missing, memory, disk, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(readers, "available_memory", lambda: memory)
    monkeypatch.setattr(readers.shutil, "disk_usage", lambda path: SimpleNamespace(free=disk))
    kind, why = readers._choose(size, missing, tmp_path / "not" / "yet", CPU)
    assert kind == expected
    assert "GB" in why


@pytest.mark.parametrize(("free", "expected"), [(40, "device"), (39, "decoded")])
def test_auto_keeps_on_the_gpu_what_a_quarter_of_its_free_memory_holds(free, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    assert readers._choose(10, 10, tmp_path, torch.device("cuda"))[0] == expected
