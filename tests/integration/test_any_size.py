"""Images of any size, from files to a trained run and what it says of files, by the commands."""

import json
import shutil

import numpy as np
import pytest
from command import TINY, call, rows
from PIL import Image

import dlops_dist
from dlops_dist.data.crops import opened
from dlops_dist.data.shards import read_manifest

SIZE = ("--augment.size", "32")
PARTS = (*SIZE, "--augment.resized-crop", "0.2", "--augment.cutout", "5")


def train(shards, runs, *arguments):
    return call("train", "q1", "--local", "--data.shards", shards, "--runs-dir", runs, *TINY, *arguments)


@pytest.fixture(scope="module")
def trained(any_size_shards, tmp_path_factory):
    """Folder of a run of two epochs, and what was printed."""
    runs = tmp_path_factory.mktemp("any-size-runs")
    options = ("--epochs", "2", "--name", "run", "--checkpoint-every", "1", "--keep-checkpoints", "9")
    code, output = train(any_size_shards, runs, *PARTS, *options)
    assert code == 0, output
    return runs / "run", output


def test_the_line_says_which_reader_and_why(trained):
    assert "data.reader: decode (augment.size cuts and scales each image as it is decoded)" in trained[1]


def test_a_run_goes_on_to_the_same_bits_with_other_threads(trained, any_size_shards, tmp_path):
    run, _ = trained
    again = shutil.copytree(run, tmp_path / "run")
    (again / "lease.json").unlink(missing_ok=True)
    for path in sorted((again / "checkpoints").iterdir())[1:]:
        path.unlink()
    code, output = train(
        any_size_shards, tmp_path, *PARTS, "--epochs", "2", "--name", "run", "--checkpoint-every", "1",
        "--keep-checkpoints", "9", "--data.threads", "5", "--data.prefetch", "1", "--data.reader", "decode",
    )  # fmt: skip
    assert code == 0, output
    assert rows(again) == rows(run)
    expected = {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    assert {path.name: path.read_bytes() for path in (again / "checkpoints").iterdir()} == expected


def test_evaluate_repeats_the_runs_figures_and_files_get_the_classes_that_it_gives(trained, any_size_shards):
    run, _ = trained
    row = rows(run)[-1]
    code, output = call("evaluate", run)
    assert code == 0, output
    for name in ("loss", "top1", "top5", "recall_at_1"):
        assert f"{name}: {row['test/' + name]!r}" in output.splitlines()
    files = any_size_shards.parent / "tree" / "test"
    code, output = call("predict", run, files, "--json")
    assert code == 0, output
    found = [json.loads(line) for line in output.splitlines()]
    hits = [row["predictions"][0]["class"] == row["path"].split("/")[-2] for row in found]
    assert len(hits) == 20
    assert np.mean(hits) == pytest.approx(row["test/top1"])


def test_a_file_is_preprocessed_to_the_pixels_that_evaluation_sees(trained, any_size_shards):
    model, manifest = dlops_dist.load(trained[0]), read_manifest(any_size_shards)
    assert model.image_size == (32, 32)
    split = opened(any_size_shards, manifest, "test", model.learner.settings.augment)
    ids = np.arange(len(split))
    images = dict(zip(split.keys_of(ids), split.read(ids), strict=True))
    for path in (any_size_shards.parent / "tree/test").rglob("*.*"):
        pixels = images[f"{path.parent.name}_{path.stem}"]
        assert np.array_equal(model.preprocess(path).numpy(), pixels)


def test_embed_and_export_see_what_evaluation_sees(trained, any_size_shards, tmp_path):
    run, _ = trained
    code, output = call("embed", run, any_size_shards, "--out", tmp_path / "out.parquet", "--split", "test")
    assert code == 0, output
    assert output.splitlines()[-1] == f"{tmp_path}/out.parquet: embeddings of 20 samples"
    code, output = call("export", run, "--format", "safetensors", "--out", tmp_path / "weights")
    assert code == 0, output
    assert f"largest difference from the model on images of {any_size_shards}" in output


def test_a_run_on_other_shards_of_any_size_is_evaluated(trained, shapes_shards):
    code, output = call("evaluate", trained[0], "--data.shards", shapes_shards)
    assert code == 0, output
    assert output.splitlines()[-1].startswith("result: run at epoch 2, test: loss ")


def test_autoencoders_see_parts_too(any_size_shards, tmp_path):
    options = ("--local", "--runs-dir", tmp_path, "--name", "run", "--data.shards", any_size_shards, "--epochs", "1")
    layers = ("--model.layers", "9", "5", "--model.code-layer", "5", "--pretrain.epochs", "1")
    code, output = call("train", "q2", *options, *layers, "--global-batch-size", "10", *PARTS)
    assert code == 0, output
    assert (tmp_path / "run/report/filters.png").is_file()


REFUSED = {
    (): ["data.shards: the images of any-size differ in size", "train with --augment.size N"],
    (*SIZE, "--data.reader", "decoded"): ["data.reader: decoded", "leave out --data.reader"],
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_does_not_fit_is_one_line_before_anything_is_written(arguments, any_size_shards, tmp_path):
    code, output = train(any_size_shards, tmp_path / "runs", *arguments)
    assert (code, len(output.splitlines())) == (2, 1), output
    assert all(text in output for text in REFUSED[arguments]), output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("damage", ["a byte", "cut off"])
def test_a_damaged_image_is_one_line_with_its_shard_and_key(damage, any_size_shards, tmp_path):
    shards = shutil.copytree(any_size_shards, tmp_path / "shards")
    path = shards / "train-000001.tar"
    content = bytearray(path.read_bytes())
    if damage == "a byte":
        content[700] ^= 1
    path.write_bytes(content if damage == "a byte" else content[:-600])
    code, output = train(shards, tmp_path / "runs", *PARTS, "--epochs", "1", "--data.no-drop-last")
    assert code == 2, output
    last = output.splitlines()[-1]
    assert last.startswith(f"error: {path}"), last
    assert ("not the bytes that were packed" if damage == "a byte" else "bytes long") in last
    assert "Traceback" not in output


def test_dry_run_and_show_tell_the_sizes(any_size_shards, tmp_path):
    code, output = call(
        "train", "q1", "--dry-run", "--data.shards", any_size_shards, "--runs-dir", tmp_path, *TINY, *SIZE
    )
    assert code == 0, output
    assert "10 classes, 32x32: 50 train, 20 test" in output
    code, output = call("shard", "show", any_size_shards)
    assert code == 0, output
    sizes = [Image.open(path).size[::-1] for path in (any_size_shards.parent / "tree").rglob("*.*")]
    (low, left), (high, right) = np.min(sizes, axis=0), np.max(sizes, axis=0)
    assert f"of {low}-{high} x {left}-{right} jpg;png;webp, id" in output.splitlines()[-1]
    assert "images of any size: train with --augment.size N" in output


def test_the_command_packs_and_indexes_images_of_any_size(any_size_shards, tmp_path):
    code, output = call("shard", "folder", "--source", any_size_shards.parent / "tree", "--keep", "--out", tmp_path)
    assert code == 0, output
    assert "images of any size: train with --augment.size N" in output
    packed = read_manifest(tmp_path / "tree")
    assert packed.packing["keep"] is True
    others = tmp_path / "others"
    others.mkdir()
    for tar in (tmp_path / "tree").glob("*.tar"):
        shutil.copy(tar, others)
    code, output = call("shard", "index", others)
    assert code == 0, output
    indexed = read_manifest(others)
    assert sorted(shard.sha256 for shard in indexed.shards) == sorted(shard.sha256 for shard in packed.shards)
    for name in ("format", "extension", "height", "mean", "std", "splits"):
        assert getattr(indexed, name) == getattr(packed, name)
    code, output = call("shard", "folder", "--source", any_size_shards.parent / "tree", "--out", tmp_path)
    assert (code, "was packed with --keep" in output) == (2, True), output
