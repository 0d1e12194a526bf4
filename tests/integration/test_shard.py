"""dlops_dist.shard, from the command line: packing, killed and refused; is a folder as it was packed; what is in it."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from command import ROOT, TINY, call, rows, run, start, wait_until
from PIL import Image

from dlops_dist.data.shapes import write_tiny_imagenet
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


def test_verify_passes_over_what_a_packing_left_that_was_killed_in_its_last_moment(shards):
    (shards / ".packing.json").write_text("{}")
    assert call("shard", "verify", shards)[0] == 0


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_what_is_damaged(damage, shards):
    DAMAGES[damage](shards)
    code, output = call("shard", "verify", shards)
    assert code == 1, output
    assert output.splitlines()[-1].startswith(f"failed: {shards}: {damage}")
    assert "Traceback" not in output


def test_show_counts_the_classes_and_draws_samples(shards):
    code, output = call("shard", "show", shards)
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
    code, output = call("shard", command, tmp_path)
    assert (code, len(output.splitlines())) == (2, 1), output


# packing: killed, refused, other sources


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


OPTIONS = ("--shard-size", "5", "--limit", "1500")


@pytest.fixture(scope="module")
def packing(tmp_path_factory):
    """The command that packs 1,500 of 2,000 small images, in 380 shards with those of test; --out is still to come."""
    archive = tmp_path_factory.mktemp("archive") / "shapes.zip"
    write_tiny_imagenet(archive, train_per_class=200, test_per_class=40, size=16)
    return "shard", "tiny-imagenet", "--source", archive, *OPTIONS


@pytest.fixture(scope="module")
def undisturbed(packing, tmp_path_factory):
    """The content of every file, packed by one process without a disturbance."""
    out = tmp_path_factory.mktemp("undisturbed")
    code, output = run(*packing, "--out", out, "--workers", "1")
    assert code == 0, output
    assert "1,500 train, 400 test, 10 classes, 380 shards" in output
    return contents(out / "tiny-imagenet")


def finished(out):
    return len(list(out.glob(".*.done")))


def is_empty(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
def test_a_packing_that_is_killed_again_and_again_ends_with_the_same_bytes(packing, undisturbed, tmp_path):
    """Of 380 shards, at most some ten more are done at each kill: each falls into the packing."""
    out, rng, seen = tmp_path / "tiny-imagenet", np.random.default_rng(), [0]
    for _ in range(8):
        process = start(*packing, "--out", tmp_path, "--workers", "2", start_new_session=True)
        wanted = seen[-1] + int(rng.integers(0, 10))
        assert wait_until(lambda wanted=wanted: finished(out) >= wanted, 30, every_s=0.001)
        time.sleep(rng.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (out / "manifest.json").exists()
        assert wait_until(lambda group=process.pid: is_empty(group), 5), "packing processes outlived their parent"
        seen.append(finished(out))
    assert seen == sorted(seen), "finished shards were forgotten"
    code, output = run(*packing, "--out", tmp_path)
    assert code == 0, output
    assert contents(out) == undisturbed


def test_what_a_packing_left_that_was_killed_once_all_was_there_is_gone_after_the_next(packing, undisturbed, tmp_path):
    out = tmp_path / "tiny-imagenet"
    out.mkdir()
    for name, content in undisturbed.items():
        (out / name).write_bytes(content)
    for name in (".packing.json", ".train-000001.tar.done"):
        (out / name).write_text("{}")
    code, output = call(*packing, "--out", tmp_path)
    assert (code, "already packed" in output) == (0, True), output
    assert contents(out) == undisturbed


def sharers(process):
    """The processes that share a packing's work."""
    children = psutil.Process(process.pid).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.parametrize(
    ("when", "whom"),
    [
        ("packing", "all, by Ctrl-C"),
        *(
            pytest.param(when, whom, marks=pytest.mark.slow)
            for when, whom in (
                ("packing", "one that shares the work"),
                ("starting", "one that shares the work"),
                ("starting", "all, by Ctrl-C"),
            )
        ),
    ],
)
def test_a_packing_that_loses_its_processes_says_so_and_goes_on(when, whom, packing, undisturbed, tmp_path):
    out = tmp_path / "tiny-imagenet"
    process = start(*packing, "--out", tmp_path, "--workers", "2", start_new_session=True)
    assert wait_until(lambda: len(sharers(process)) == 2, 30, every_s=0.001)
    assert when == "starting" or wait_until(lambda: finished(out) >= 5, 30, every_s=0.001)
    if whom == "all, by Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
        expected = 130, "interrupted; the same command goes on where it can"
    else:
        sharers(process)[0].kill()
        expected = 1, "failed: a process that shared the work was killed, for memory perhaps; the same command goes on"
    output, _ = process.communicate(timeout=30)
    *progress, last = output.splitlines()
    assert (process.returncode, last[: len(expected[1])]) == expected, output
    assert all(line.startswith("packing") for line in progress), output
    assert wait_until(lambda: is_empty(process.pid), 5), "packing processes outlived the command"
    assert finished(out) < 380
    code, output = run(*packing, "--out", tmp_path)
    assert code == 0, output
    assert contents(out) == undisturbed


def test_two_packings_of_one_folder_are_refused(packing, tmp_path):
    folder = tmp_path / "tiny-imagenet"
    folder.mkdir()
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    code, output = call(*packing, "--out", tmp_path)
    os.close(held)
    assert (code, len(output.splitlines())) == (2, 1), output
    assert "being packed by another process" in output
    assert list(folder.iterdir()) == []


def test_what_is_packed_otherwise_is_refused_by_name(packing, undisturbed, tmp_path):
    (tmp_path / "tiny-imagenet").mkdir()
    for name, content in undisturbed.items():
        (tmp_path / "tiny-imagenet" / name).write_bytes(content)
    code, output = call("shard", "tiny-imagenet", "--out", tmp_path)
    assert (code, len(output.splitlines())) == (2, 1), output
    assert "--shard-size 5, --limit 1500" in output
    code, output = call(*packing, "--out", tmp_path)
    assert (code, "already packed" in output) == (0, True)


def test_a_tree_of_folders_is_packed_and_trained_on(tmp_path):
    rng = np.random.default_rng(0)
    for split, number in (("train", 12), ("val", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                size = (40, 40 + i, 3)
                Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(folder / f"{i}.jpg")
    arguments = ("shard", "folder", "--source", tmp_path / "pets", "--out", tmp_path / "shards")
    code, output = call(*arguments)
    assert (code, "--size" in output.splitlines()[-1]) == (2, True), output
    code, output = call(*arguments, "--size", "32")
    assert code == 0, output
    assert "pets: 24 images to train in train/, 6 to test in val/, 2 classes: cat 12, dog 12" in output
    assert "24 train, 6 test, 2 classes" in output
    shards = tmp_path / "shards/pets"
    options = ("--local", "--runs-dir", tmp_path / "runs", "--epochs", "1", "--data.shards", shards)
    code, output = call("train", "q1", *options, *TINY)
    assert code == 0, output
    assert "data.reader: decoded" in output


def write_images(folder, number):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(number):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i}.jpg")


def test_an_open_set_is_packed_and_indexed_and_said_to_be_one(tmp_path):
    for place, number in {"train/cat": 4, "train/dog": 4, "test/ape": 2, "test/bee": 2}.items():
        write_images(tmp_path / "pets" / place, number)
    code, output = call("shard", "--source", tmp_path / "pets", "folder", "--out", tmp_path / "shards")
    assert code == 0, output
    assert "2 classes: cat 4, dog 4; an open set: 2 other classes to test on: ape, bee" in output
    assert "8 train, 4 test, 4 classes" in output
    shards = tmp_path / "shards/pets"
    manifest = read_manifest(shards)
    assert manifest.classes == ["ape", "bee", "cat", "dog"]
    assert sorted(Split(shards, manifest, "test").labels) == [0, 0, 1, 1]
    assert sorted(Split(shards, manifest, "train").labels) == [2] * 4 + [3] * 4
    for name in ("manifest.json", "index.parquet"):
        (shards / name).unlink()
    code, output = call("shard", "index", shards)
    assert code == 0, output
    assert "an open set: 2 classes to test on, none of which has a training sample" in output
    assert "have no training sample" not in output
    write_images(tmp_path / "pets/test/dog", 1)
    code, output = call("shard", "folder", "--source", tmp_path / "pets", "--out", tmp_path / "shards", "--again")
    assert (code, "not in train: ape, bee; train has cat, dog" in output.splitlines()[-1]) == (2, True), output


def test_an_open_set_is_trained_evaluated_and_reported(tmp_path):
    for place, number in {"train/cat": 10, "train/dog": 10, "test/ape": 3, "test/bee": 3}.items():
        write_images(tmp_path / "pets" / place, number)
    code, output = call("shard", "folder", "--source", tmp_path / "pets", "--out", tmp_path / "shards")
    assert code == 0, output
    recipe, shards = ROOT / "examples/open_set_retrieval.py", tmp_path / "shards/pets"
    options = ("--local", "--data.reader", "decode", "--runs-dir", tmp_path / "runs", "--name", "run", "--epochs", "1")
    options += ("--data.shards", shards, "--data.val-fraction", "0.3", "--global-batch-size", "8")
    code, output = call("train", recipe, *options)
    assert code == 0, output
    assert "best on the held-out part of train after 1: test loss - Recall@1 " in output.splitlines()[-1]
    (row,) = rows(tmp_path / "runs/run")
    retrieval = [f"recall_at_{k}" for k in (1, 2, 4, 8)] + ["map_at_r"]
    assert {name for name in row if name.startswith("test/")} == {f"test/{name}" for name in ["loss", *retrieval]}
    assert row["test/loss"] is None
    assert {"val/top1", "val/recall_at_1", "val/recall_at_2"} <= row.keys()
    assert (
        0 <= row["test/map_at_r"] <= row["test/recall_at_2"] <= row["test/recall_at_4"] <= row["test/recall_at_8"] == 1
    )
    code, output = call("evaluate", tmp_path / "runs/run", "--recipe", recipe)
    assert code == 0, output
    assert [f"{name}: {row[f'test/{name}']!r}" in output.splitlines() for name in retrieval] == [True] * 5
    code, output = call("report", tmp_path / "runs/run")
    assert code == 0, output
    assert "test MAP@R" in " ".join(output.split())
    page = (tmp_path / "runs/run/report/index.html").read_text()
    assert ("Nearest neighbours" in page, "What is taken for what" in page, "ape" in page) == (True, False, True)


def test_bad_images_are_left_out_and_a_test_split_is_held_out_where_that_is_asked_for(tmp_path):
    for name in ("cat", "dog"):
        write_images(tmp_path / "pets" / name, 10)
    (tmp_path / "pets/cat/3.jpg").write_bytes(b"")
    folders = ("--source", tmp_path / "pets", "--out", tmp_path / "shards")
    arguments = ("shard", "folder", *folders, "--test-fraction", "0.3")
    code, output = call(*arguments)
    assert (code, "cat/3.jpg (it is empty)" in output.splitlines()[-1]) == (2, True), output
    code, output = call(*arguments, "--skip-bad")
    assert code == 0, output
    manifest = read_manifest(tmp_path / "shards/pets")
    assert manifest.skipped == {"cat/3.jpg": "it is empty"}
    assert sum(manifest.splits.values()) == 19
    code, output = call(*arguments)
    assert (code, "packed with --skip-bad;" in output) == (2, True), output


def test_shards_of_others_are_indexed_and_trained_on(shards, tmp_path):
    before = {path.name: path.read_bytes() for path in shards.glob("*.tar")}
    manifest = read_manifest(shards)
    for name in ("manifest.json", "index.parquet"):
        (shards / name).unlink()
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{name}\n" for name in [*manifest.classes, "unseen"]))
    code, output = call("shard", "index", shards, "--class-names", names)
    assert (code, "warning: 1 of 11 classes have no training sample: unseen" in output) == (0, True), output
    names.write_text("".join(f"{name}\n" for name in manifest.classes))
    code, output = call("shard", "index", shards, "--class-names", names)
    assert (code, "warning" in output) == (0, False), output
    assert "240 train, 60 test, 10 classes, 4 shards" in output
    assert {path.name: path.read_bytes() for path in shards.glob("*.tar")} == before
    assert call("shard", "verify", shards)[0] == 0
    again = read_manifest(shards)
    assert (again.classes, again.mean, again.std) == (manifest.classes, manifest.mean, manifest.std)
    options = ("--local", "--runs-dir", tmp_path / "runs", "--epochs", "1", "--data.shards", shards)
    code, output = call("train", "q1", *options, *TINY, "--data.reader", "decode")
    assert code == 0, output


MISTAKES = {
    "no source": (["folder"], ["--source"]),
    "a part that is none": (["folder", "--test-fraction", "1.5"], ["test_fraction: '1.5'", "less than 1"]),
    "a part of what has a test": (["shapes", "--test-fraction", "0.2"], ["--test-fraction goes with folder"]),
    "a pipe": (["tiny-imagenet", "--source", "pipe:touch {}/executed"], ["pipe:", "nothing is run"]),
    "an index of nothing": (["index", "{}"], [".tar"]),
    "an index of nowhere": (["index", "{}/nowhere"], ["nowhere"]),
    "nothing": (["shapes", "--limit", "0"], ["limit: '0'", "greater than or equal to 1"]),
    "no number": (["shapes", "--limit", "few"], ["limit: 'few'", "valid integer"]),
    "a seed that is none": (["shapes", "--seed", str(2**32)], ["seed: '4294967296'", "less than 4294967296"]),
    "no dataset": (["shapez"], ["'shapez'", "tiny-imagenet", "stl10", "folder", "shapes"]),
    "a word for a flag": (["shapes", "--limt", "3"], ["--limt; did you mean --limit?"]),
    "no folder": (["verify"], ["folder is missing"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, tmp_path):
    arguments, shown = MISTAKES[mistake]
    code, output = call("shard", *(argument.format(tmp_path) for argument in arguments), cwd=tmp_path)
    assert (code, len(output.splitlines())) == (2, 1), output
    assert all(word in output for word in shown), output
    assert list(tmp_path.iterdir()) == []


HELP = {
    (): ["dlops_dist.shard folder --source DIR --size 64", "--test-fraction FLOAT", "--skip-bad", "by sorted name"],
    ("verify",): ["Hash every file", "PATH"],
    ("show",): ["Print classes", "PATH"],
    ("index",): ["must tell the split", "--class-names PATH", "--workers INT"],
}


@pytest.mark.parametrize("command", HELP)
def test_each_command_says_what_it_takes(command):
    code, output = call("shard", *command, "--help")
    assert code == 0, output
    assert all(text in output for text in HELP[command]), output


def test_help_waits_for_no_large_package():
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print([m for m in ('torch', 'pyarrow', 'matplotlib') if m in sys.modules]))\n"
        f"sys.argv = ['shard.py', '--help']; runpy.run_path({str(ROOT / 'launch/shard.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("where", ["pipe:touch executed", "s3://bucket/shards", "http://127.0.0.1:1/shards"])
def test_shards_that_are_no_folder_are_refused_and_nothing_is_run(where, tmp_path):
    code, output = call("train", "q1", "--local", "--data.shards", where, *TINY, cwd=tmp_path)
    assert (code, len(output.splitlines())) == (2, 1), output
    assert "must be a folder" in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [("show",), ("verify",), ("index",), ("shapes", "--out")])
def test_a_url_where_a_path_must_be_is_one_line_and_makes_no_folder(command, tmp_path):
    code, output = call("shard", *command, "s3://bucket/shards", cwd=tmp_path)
    assert (code, len(output.splitlines())) == (2, 1), output
    assert "'s3://bucket/shards' must be a path on this machine" in output
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    mounted = subprocess.run(["mount", *options], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.root
def test_packing_onto_a_full_disk_is_one_line_and_leaves_nothing_half_written(packing, small_disk):
    code, output = run(*packing, "--out", small_disk, "--workers", "2")
    assert code == 1, output
    assert "Traceback" not in output
    assert output.splitlines()[-1].endswith("No space left on device")
    assert f"failed: {small_disk / 'tiny-imagenet'}" in output.splitlines()[-1]
    left = list((small_disk / "tiny-imagenet").iterdir())
    assert not [path for path in left if path.name == "manifest.json" or path.name.endswith(".partial")]
    assert all(len(path.read_bytes()) % 512 == 0 for path in left if path.suffix == ".tar")


@pytest.mark.root
def test_training_with_its_cache_on_a_full_disk_decodes_with_a_warning(shapes_shards, small_disk, tmp_path):
    options = ("--local", "--runs-dir", tmp_path / "runs", "--epochs", "1", "--data.shards", shapes_shards)
    code, output = run("train", "q1", *options, *TINY, "--data.cache-dir", small_disk, "--data.reader", "decoded")
    assert code == 0, output
    assert "warning: data.cache_dir: " in output
    assert "No space left on device" in output
    assert "data.reader: decode (" in output
    assert not [path for path in small_disk.iterdir() if not path.name.endswith(".lock")]
