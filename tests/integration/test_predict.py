"""From a trained run to classes of image files."""

import json

import numpy as np
import pytest
import torch
from command import TINY, call, rows
from PIL import Image

import dlops_dist
from dlops_dist.data.shards import Split, read_manifest

FIGURES = ("--epochs", "2", "--loss", "center", "--ema-decay", "0.9", "--flip-test", "--name", "run")


@pytest.fixture(scope="module")
def trained(shapes_shards, tmp_path_factory):
    """Folder of a run, and one of its test images as files, lossless, in a subfolder for each class."""
    folder = tmp_path_factory.mktemp("predict")
    data = ("--data.shards", shapes_shards, "--runs-dir", folder)
    code, output = call("train", "q1", "--local", *data, *TINY, *FIGURES)
    assert code == 0, output
    manifest = read_manifest(shapes_shards)
    split = Split(shapes_shards, manifest, "test")
    for i, (pixels, label) in enumerate(zip(split.read(np.arange(len(split))), split.labels, strict=True)):
        path = folder / "images" / manifest.classes[label] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(pixels)).save(path)
    return folder


def test_files_get_the_classes_that_evaluation_gives(trained):
    code, output = call("predict", trained / "run", trained / "images", "--json", "--top", "3")
    assert code == 0, output
    found = [json.loads(line) for line in output.splitlines()]
    assert len(found) == 60
    hits = sum(row["predictions"][0]["class"] == row["path"].split("/")[-2] for row in found)
    assert hits / 60 == pytest.approx(rows(trained / "run")[-1]["test/top1"])
    for row in found:
        probabilities = [prediction["probability"] for prediction in row["predictions"]]
        assert len(probabilities) == 3
        assert sorted(probabilities, reverse=True) == probabilities
        assert 0 < sum(probabilities) < 1


def test_a_loaded_model_judges_in_evaluation_mode(trained, shapes_shards):
    model = dlops_dist.load(trained / "run")
    assert (model.classes, model.image_size) == (tuple(read_manifest(shapes_shards).classes), (32, 32))
    assert not model.training
    images = torch.stack([model.preprocess(path) for path in sorted((trained / "images").rglob("*.png"))[:5]])
    logits = model(images)
    assert logits.shape == (5, 10)
    assert model.embed(images).shape == (5, 64)
    torch.testing.assert_close(model(images[2:3]), logits[2:3])
    ((best,),) = model.predict(images[2:3])
    assert best[0] == model.classes[logits[2].argmax()]
    assert best[1] == pytest.approx(float(logits[2].double().softmax(dim=0).max()), rel=1e-4)
    assert len(model.predict(images, top=99)[0]) == 10
    assert not logits.requires_grad
    for other in (images / 255, images.permute(0, 3, 1, 2), images[0]):
        with pytest.raises(ValueError, match=r"images must be uint8 \(N, H, W, 3\), not torch\."):
            model.predict(other)


def test_a_loaded_model_compiles_nothing_on_any_device(trained):
    assert dlops_dist.load(trained / "run").learner.settings.compile is False


def test_what_cannot_be_read_is_named_and_the_rest_is_classified(trained, tmp_path):
    first = next((trained / "images").rglob("*.png"))
    (tmp_path / "good.png").write_bytes(first.read_bytes())
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "large.png").write_bytes(first.read_bytes())
    Image.open(first).resize((90, 60)).save(tmp_path / "large.png")
    code, output = call("predict", trained / "run", tmp_path)
    assert code == 1, output
    assert f"warning: {tmp_path}/bad.jpg: no image: it begins with" in output
    assert output.splitlines()[-1] == "failed: 1 of 3 images could not be read"
    for name in ("good.png", "large.png"):
        assert f"{tmp_path}/{name}: " in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["nowhere.png"], "nowhere.png: there is no such file"), (["empty"], "empty: there is no file in it"),
     (["empty", "--top", "0"], "--top: 0 must be at least 1")],
)  # fmt: skip
def test_a_mistake_is_one_line(arguments, words, trained, tmp_path):
    (tmp_path / "empty").mkdir()
    code, output = call("predict", trained / "run", *arguments, cwd=tmp_path)
    assert (code, len(output.splitlines())) == (2, 1), output
    assert words in output
