"""A trained model used elsewhere: embeddings of shards in a table, files for other programs."""

import copy
import json
import shutil
from collections import Counter

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
import safetensors
import torch
from command import CACHE, ROOT, TINY, call

import dlops_dist
from dlops_dist.config import recipe_file
from dlops_dist.data.shards import Split, read_manifest
from dlops_dist.engine import formats
from dlops_dist.engine.run_folder import RunFolder

CPU = torch.device("cpu")
FIGURES = ("--ema-decay", "0.9", "--flip-test", "--name", "run")
SMALL_Q2 = [
    *("--data.cache-dir", CACHE, "--global-batch-size", "20", "--epochs", "2", "--model.layers", "24", "16"),
    *("--model.code-layer", "16", "--pretrain.epochs", "1", "--name", "run", "--model.dropout", "0.2"),
]  # fmt: skip
DROPS = """
from torch import nn
from dlops_dist import CrossEntropyLoss, Embedder, Recipe, Run

class Settings(Run):
    pass

def recipe(settings, inputs):
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Dropout2d(0.5), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Recipe(Embedder(trunk, 8, inputs.num_classes, inputs.image_size), {"ce": (1.0, CrossEntropyLoss())})
"""


def trained(folder, recipe, shards, *arguments):
    code, output = call("train", recipe, "--local", "--data.shards", shards, "--runs-dir", folder, *arguments)
    assert code == 0, output
    return folder / "run"


@pytest.fixture(scope="module")
def q1(shapes_shards, tmp_path_factory):
    """Folder of a run with averaged weights, judged by mirror images too."""
    return trained(tmp_path_factory.mktemp("q1"), "q1", shapes_shards, *TINY, "--epochs", "1", *FIGURES)


@pytest.fixture(scope="module")
def q2(stl_shards, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("q2"), "q2", stl_shards, *SMALL_Q2)


def rows_of(run, shards, tmp_path, *arguments):
    code, output = call("embed", run, shards, "--out", tmp_path / "found.parquet", *arguments)
    assert code == 0, output
    return pq.read_table(tmp_path / "found.parquet")


def test_every_sample_is_embedded_once_in_the_order_of_the_index(q2, stl_shards, tmp_path):
    table = rows_of(q2, stl_shards, tmp_path)
    manifest, model = read_manifest(stl_shards), dlops_dist.load(q2)
    assert Counter(table["split"].to_pylist()) == {"train": 80, "test": 30, "unlabeled": 45}
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[16]"
    found = table.to_pylist()
    for name in manifest.splits:
        split, own = Split(stl_shards, manifest, name), [row for row in found if row["split"] == name]
        assert [row["key"] for row in own] == split.keys_of(np.arange(len(split)))
        labels = [None if label < 0 else label for label in split.labels.tolist()]
        assert [row["label"] for row in own] == labels
        assert [row["class"] for row in own] == [None if c is None else manifest.classes[c] for c in labels]
        embeddings = model.embed(torch.from_numpy(split.read(np.arange(len(split)))))
        assert np.array_equal([row["embedding"] for row in own], embeddings.numpy())


def test_chosen_splits_are_embedded_in_blocks_as_they_are_evaluated(q1, shapes_shards, tmp_path, monkeypatch):
    monkeypatch.setattr("dlops_dist.engine.embedding.BLOCK", 50)  # 240 samples: parts of 200 and 40
    table = rows_of(q1, shapes_shards, tmp_path, "--split", "test", "train")
    assert table["split"].to_pylist() == ["test"] * 60 + ["train"] * 240
    split, model = Split(shapes_shards, read_manifest(shapes_shards), "train"), dlops_dist.load(q1)
    images = torch.from_numpy(split.read(np.arange(240)))
    wanted = torch.cat([model.embed(block) for block in images.split(50)])
    found = np.stack(table["embedding"].to_numpy()[60:])
    assert found.dtype == np.float32
    assert np.array_equal(found, wanted.numpy())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--split", "val"], "has no split 'val', only train, test"), (["--out", "."], "--out: . is a folder"),
     (["--workers", "0"], "--workers: 0 must be at least 1")],
)  # fmt: skip
def test_a_mistake_in_embed_is_one_line(arguments, words, q1, shapes_shards, tmp_path):
    code, output = call("embed", q1, shapes_shards, "--out", "a.parquet", *arguments, cwd=tmp_path)
    assert (code, len(output.splitlines())) == (2, 1), output
    assert words in output
    assert not list(tmp_path.iterdir())


def test_shards_that_do_not_fit_or_are_damaged_are_one_line_and_leave_no_file(q1, shapes_shards, stl_shards, tmp_path):
    code, output = call("embed", q1, stl_shards, "--out", tmp_path / "a.parquet")
    assert (code, len(output.splitlines())) == (2, 1), output
    assert f"{stl_shards}: its images are 96x96, {q1} was trained on 32x32" in output
    shutil.copytree(shapes_shards, tmp_path / "shards")
    shard = tmp_path / "shards/train-000001.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, output = call("embed", q1, tmp_path / "shards", "--out", tmp_path / "out/a.parquet")
    assert (code, len(output.splitlines())) == (2, 1), output
    assert f"{shard}: " in output
    assert "not the bytes that were packed" in output
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture
def own(shapes_shards, tmp_path):
    """Trains a user's recipe; the run's folder, and the file."""

    def train_own(text):
        (tmp_path / "own.py").write_text(text)
        small = ["--data.cache-dir", CACHE, "--global-batch-size", "60", "--optimizer.lr", "0.001", "--epochs", "1"]
        return trained(tmp_path, tmp_path / "own.py", shapes_shards, *small, *FIGURES), tmp_path / "own.py"

    return train_own


def by_onnx(path, images):
    """(logits, embeddings) by nothing but the file, and the texts in it."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(["logits", "embeddings"], {"images": images.numpy()})
    return [torch.from_numpy(values) for values in found], session.get_modelmeta().custom_metadata_map


def by_torch(path, images):
    texts = dict.fromkeys(["classes", "mean", "std", "image_size", "recipe"], "")
    return torch.export.load(path, extra_files=texts).module()(images), texts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q1", "q2", "drops", "arcface"])
def test_an_exported_function_computes_what_the_model_computes(name, request, own, tmp_path):
    recipe = []
    if name in ("q1", "q2"):
        run = request.getfixturevalue(name)
    else:
        run, file = own(DROPS if name == "drops" else (ROOT / "examples/arcface.py").read_text())
        recipe = ["--recipe", file]
    model = dlops_dist.load(run, *map(str, recipe[1:]), device=CPU)
    for kind, computed, suffix in (("onnx", by_onnx, "onnx"), ("torch-export", by_torch, "pt2")):
        path = tmp_path / f"deep/{name}.{suffix}"
        code, output = call("export", run, "--format", kind, "--out", path, *recipe)
        assert (code, len(output.splitlines())) == (0, 1), output
        assert b"site-packages" not in path.read_bytes()
        for number in (1, 2, 5):
            images = torch.randint(0, 256, (number, *model.image_size, 3), dtype=torch.uint8)
            (logits, embeddings), texts = computed(path, images)
            torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(embeddings, model.embed(images), rtol=1e-4, atol=1e-4)
        assert json.loads(texts["classes"]) == list(model.classes)
        assert json.loads(texts["image_size"]) == list(model.image_size)


def test_safetensors_hold_the_averaged_weights_and_what_images_need(q1, shapes_shards):
    code, output = call("export", q1, "--format", "safetensors")
    assert code == 0, output
    assert f"{q1}/export/run.safetensors: largest difference from the model on images of {shapes_shards}: " in output
    state, manifest = RunFolder(q1).result(CPU, warn=print), read_manifest(shapes_shards)
    with safetensors.safe_open(q1 / "export/run.safetensors", "pt") as file:
        found, texts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    assert found.keys() == state["ema"].keys()
    assert all(torch.equal(found[name], value) for name, value in state["ema"].items())
    assert not torch.equal(state["model"]["fc.weight"], state["ema"]["fc.weight"])
    wanted = {"classes": manifest.classes, "mean": list(manifest.mean), "std": list(manifest.std),
              "image_size": [32, 32], "recipe": "q1"}  # fmt: skip
    assert {name: json.loads(text) for name, text in texts.items()} == wanted


@pytest.mark.parametrize("kind", [pytest.param("onnx", marks=pytest.mark.slow), "safetensors"])
def test_a_file_that_computes_something_else_is_not_written(kind, q1, tmp_path, monkeypatch):
    def write(network, images, texts):
        worse = copy.deepcopy(network)
        with torch.no_grad():
            worse.network.model.bn1.running_var.mul_(1.001)
        return real.write(worse, images, texts)

    real = formats.FORMATS[kind]
    monkeypatch.setitem(formats.FORMATS, kind, real._replace(write=write))
    (tmp_path / "file").write_text("of before")
    code, output = call("export", q1, "--format", kind, "--out", tmp_path / "file")
    assert (code, len(output.splitlines())) == (1, 1), output
    assert f"--format {kind}: what was written differs from the model: logits " in output
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "of before"


def test_without_shards_a_file_is_compared_on_random_pixels(q1, tmp_path):
    shutil.copytree(q1, tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("shards: /", "shards: /gone/"))
    code, output = call("export", tmp_path / "run", "--format", "safetensors")
    assert code == 0, output
    warning, told = output.splitlines()
    assert warning.startswith("warning: data.shards: /gone/")
    assert "from the model on random pixels: logits 0.0e+00 (rounding explains " in told


def test_a_missing_package_is_one_line(q1, monkeypatch):
    monkeypatch.setattr("dlops_dist.export.find_spec", lambda name: None if name == "onnxscript" else name)
    code, output = call("export", q1, "--format", "onnx")
    assert (code, len(output.splitlines())) == (2, 1), output
    assert "onnxscript is not installed; run pip install 'dlops_dist[export]'" in output


def test_a_model_that_cannot_be_traced_is_one_line(own, tmp_path):
    run, file = own(
        DROPS.replace("nn.Flatten()", "Odd()") + "\nclass Odd(nn.Module):\n"
        "    def forward(self, x):\n        return x.flatten(1) * (2 if x.sum().item() > 1e9 else 1)\n"
    )
    code, output = call("export", run, "--format", "torch-export", "--recipe", file)
    assert (code, len(output.splitlines())) == (1, 1), output
    assert "failed: --format torch-export: " in output


def test_a_run_is_loaded_by_its_recipe_wherever_that_lies_now(own, tmp_path, monkeypatch):
    run, file = own(DROPS)
    file.rename(tmp_path / "moved.py")
    monkeypatch.setattr(recipe_file, "_loaded", {})  # as in a new process
    assert len(dlops_dist.load(run, recipe=str(tmp_path / "moved.py")).classes) == 10
