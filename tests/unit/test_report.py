"""What stands beside a run's figures, and that figures which cannot be are drawn as gaps."""

import json
import math
from unittest.mock import ANY

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from dlops_dist import draw
from dlops_dist.console import epoch_line
from dlops_dist.data.shards import MANIFEST, Manifest
from dlops_dist.engine.gallery import Gallery
from dlops_dist.recipes.q1 import Settings as Q1
from dlops_dist.recipes.q2 import Settings as Q2
from dlops_dist.report.of_run import run_page
from dlops_dist.report.panels import epoch_panels
from dlops_dist.report.printing import Printed
from dlops_dist.report.runs import Reported, confusion_of
from dlops_dist.report.writing import write_page, write_run

CLASSES = {"q1": 200, "q2": 10}


def manifest(dataset, classes, **packing):
    return Manifest(
        dataset=dataset, packing={"seed": 0, **packing}, extension="jpg", height=64, width=64, mean=(0.5,) * 3,
        std=(0.5,) * 3, classes=[f"c{i}" for i in range(classes)], splits={}, shards=[], index_sha256="",
    )  # fmt: skip


def row(epoch, classes, **more):
    figures = {f"{split}/{name}": 0.25 for split in ("train", "test") for name in ("loss", "top1", "top5")}
    return {"epoch": epoch, "step": epoch, **figures, "test/top1_by_class": [0.5] * classes, **more}


@pytest.fixture
def reported(tmp_path, capsys):
    """What is printed of a run of a task on shards with a manifest."""

    def print_of(task, shown_manifest, num_classes=None, **settings):
        shards, run = tmp_path / "shards", tmp_path / "run"
        shards.mkdir()
        run.mkdir()
        if shown_manifest is not None:
            (shards / MANIFEST).write_bytes(shown_manifest.to_bytes())
        values = {"q1": Q1, "q2": Q2}[task](data={"shards": str(shards)}, **settings).model_dump()
        (run / "config.yaml").write_text(yaml.safe_dump({"task": task, **values}))
        rows = [row(epoch, num_classes or CLASSES[task]) for epoch in (1, 2)]
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
        write_run(str(run), Printed(console=Console(width=250)))
        return capsys.readouterr().out

    return print_of


@pytest.mark.parametrize(
    ("task", "dataset", "settings", "words"),
    [
        ("q1", "tiny-imagenet", {"loss": "triplet"}, ["0.7600", "65.00%"]),
        ("q1", "tiny-imagenet", {}, ["1.5670", "59.36%"]),
        ("q2", "stl10", {"finetune": True}, ["52.31%", "47.99%", "1.5100", "82.3"]),
    ],
)
def test_the_studys_figures_stand_beside_a_run_on_its_data(task, dataset, settings, words, reported):
    output = reported(task, manifest(dataset, CLASSES[task]), **settings)
    assert "original study, 10 epochs" in output
    assert all(word in output for word in words), output


OTHERS = {
    "other data": ("q1", manifest("shapes", 200), 200),
    "fewer classes": ("q1", manifest("tiny-imagenet", 20), 20),
    "a part of the images": ("q1", manifest("tiny-imagenet", 200, limit=1000), 200),
    "another size": ("q1", manifest("tiny-imagenet", 200, size=32), 200),
    "shards that were packed again since": ("q1", manifest("tiny-imagenet", 200), 20),
    "the other half's data": ("q1", manifest("stl10", 10), 10),
    "shards that are gone": ("q1", None, 200),
    "a stand-in": ("q2", manifest("shapes-stl10", 10), 10),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_they_do_not_stand_beside_a_run_on(kind, reported):
    task, shown_manifest, num_classes = OTHERS[kind]
    output = reported(task, shown_manifest, num_classes)
    assert "original study" not in output
    assert "25.00%" in output


def test_a_loss_that_cannot_be_is_a_gap_in_the_curve(tmp_path):
    rows = [row(1, 3, **{"train/loss": None, "test/loss": None}), row(2, 3, **{"train/loss": None})]
    panels = epoch_panels(Reported(str(tmp_path), "run", Q1(loss="triplet"), rows))
    (test_loss,) = [line for line in panels[0].lines if line.label == "test loss"]
    assert (len(panels[0].lines), test_loss.points) == (1, [(1, ANY), (2, 0.25)])
    assert math.isnan(test_loss.points[0][1])
    draw.curves(tmp_path / "curves.png", "run", panels)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_thousand_classes_are_a_page_too(tmp_path):
    number, draws = 1000, np.random.default_rng(0)
    labels = np.arange(3000) % number
    predicted = np.where(draws.random(3000) < 0.3, labels, draws.integers(0, number, 3000))
    places = draws.normal(size=(3000, 2)).astype(np.float32)
    gallery = Gallery(
        {"dataset": "many", "classes": number, "train": 9, "test": 3000}, tuple(f"class <{n}>" for n in range(number)),
        labels, predicted, np.arange(3000), places, np.array([0.1, 0.1]), np.linspace(0, 1, 5), np.full((2, 4), 0.25),
        np.array([[0, 1]]), np.array([0, 1]), np.zeros(0, np.int64), [b"jpeg"] * 2,
    )  # fmt: skip
    rows = [row(1, number, **{"test/top1_by_class": draws.random(number).round(2).tolist()})]
    text = run_page(Reported(str(tmp_path), "run", Q1(), rows, gallery=gallery), "index")
    assert len(text) < 3e6
    assert "class <" not in text
    assert "The 12 worst" in text
    assert text.count("<tr>") > number, "all of them can be looked up"
    draw.class_accuracies(tmp_path / "classes.png", rows[0]["test/top1_by_class"], gallery.classes)
    draw.confusion(tmp_path / "confusion.png", confusion_of(gallery), gallery.classes)
    with Image.open(tmp_path / "classes.png") as bars, Image.open(tmp_path / "confusion.png") as matrix:
        assert max(*bars.size, *matrix.size) < 3000


@pytest.mark.parametrize(("seconds", "drawn"), [(3.0, []), (60.0, ["curves.png"])])
def test_a_run_of_minutes_ends_with_pictures_too(seconds, drawn, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"task": "q1", **Q1().model_dump()}))
    rows = [row(epoch, 10, epoch_s=seconds) for epoch in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
    assert write_page(str(tmp_path)) == str(tmp_path / "report/index.html")
    assert [path.name for path in (tmp_path / "report").glob("*.png")] == drawn


@pytest.mark.parametrize(
    "figures",
    [{}, {"train/loss": None, "test/top1": None}, {"stage": "layer 1", "val/loss": 0.1}, {"test/top1_by_class": []},
     {"test/top1": 0.5, "test/top1_by_class": [None, None]}],
)  # fmt: skip
def test_rows_of_another_version_are_shown_as_far_as_they_go(figures, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"task": "q1", **Q1().model_dump()}))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "step": 5, **figures}) + "\n")
    (tmp_path / "steps.jsonl").write_text('{"step": 5, "loss": 1.0}\nhalf a li')
    write_run(str(tmp_path), Printed("csv"))
    assert capsys.readouterr().out.startswith("run,variant,seeds,dataset,epoch")
    assert "No test images are shown" in (tmp_path / "report/index.html").read_text()


def own_row(epoch, **figures):
    """Of a user's recipe that judges no head, and adds a figure of its own."""
    losses = {"train/loss": 1.5, "train/arcface": 1.5, "val/loss": 1.6, "test/loss": 1.7, "test/arcface": 1.7}
    speed = {"train_images_per_s": 9.0, "epoch_s": 1.0}
    return {"epoch": epoch, "step": epoch, **losses, "test/recall_at_1": 0.5, **figures, **speed}


@pytest.mark.parametrize("unjudged", [{}, {"train/top1": None, "test/top1": None, "test/top1_by_class": None}])
def test_a_users_figures_are_shown_by_their_names_and_the_head_need_not_be_judged(unjudged, tmp_path, capsys):
    rows = [own_row(epoch, **{"val/mean_rank": 0.25, "test/mean_rank": value}, **unjudged) for epoch, value in
            ((1, 0.12345), (2, None), (3, 0.375))]  # fmt: skip
    head = " top-1 -" if unjudged else ""
    assert epoch_line(rows[0], 3) == (
        f"epoch 1/3  train loss 1.5000{head}  val loss 1.6000 mean_rank 0.2500  "
        f"test loss 1.7000{head} Recall@1 50.00% mean_rank 0.1235  9 images/s  1.0 s"
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"task": "q1", **Q1().model_dump()}))
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
    run = write_run(str(tmp_path), Printed(console=Console(width=250)))
    output = capsys.readouterr().out
    assert "test mean_rank" in output
    assert "0.3750" in output
    assert "arcface" not in output
    panels = {panel.title: panel for panel in epoch_panels(run)}
    assert ("Accuracy of the head" in panels) == ("train/top1" in rows[0] and rows[0]["train/top1"] is not None)
    lines = {line.label: line.points for line in panels["Figures of the recipe"].lines}
    assert lines == {
        "val mean_rank": [(1, 0.25), (2, 0.25), (3, 0.25)], "test mean_rank": [(1, 0.12345), (2, ANY), (3, 0.375)],
    }  # fmt: skip
    assert math.isnan(lines["test mean_rank"][1][1])
