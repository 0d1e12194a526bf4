"""q2's commands as its users give them, in one process."""

import json
import signal

import pytest
import torch
from command import CACHE, call, rows, start, wait_until

from dlops_dist.engine import fit
from dlops_dist.recipes.q2 import Settings as Q2

SMALL = [
    *("--data.cache-dir", CACHE, "--global-batch-size", "20", "--epochs", "2", "--model.layers", "24", "16", "12"),
    *("--model.code-layer", "16", "--pretrain.epochs", "1", "--name", "run"),
]  # fmt: skip


def train(shards, runs, *arguments, **options):
    return call("train", "q2", "--local", "--data.shards", shards, "--runs-dir", runs, *SMALL, *arguments, **options)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A folder of runs in which --smoke was trained, with each fold in turn; and what was printed."""
    folder = tmp_path_factory.mktemp("smoke")
    code, output = call("train", "q2", "--smoke", "--folds", "--epochs", "1", "--runs-dir", folder, "--name", "folds")
    assert code == 0, output
    assert "top-1 of 10 folds: mean " in output.splitlines()[-1]
    code, output = call("train", "q2", "--smoke", "--runs-dir", folder, "--name", "run")
    assert code == 0, output
    return folder, output


def test_smoke_trains_every_stage_and_reports_what_the_study_does(smoke):
    folder, output = smoke
    told = rows(folder / "run")
    stages = ["layer 1"] * 2 + ["layer 2"] * 2 + ["layer 3"] * 2 + ["joint"] + ["classifier"] * 4
    assert [row["stage"] for row in told] == stages
    assert [row["epoch"] for row in told] == list(range(1, 12))
    for row in told[:7]:
        assert {"train/loss", "test/loss", "test/relative_loss"} <= row.keys()
    for row in told[7:]:
        assert {"train/loss", "train/top1", "test/loss", "test/top1", "test/top1_by_class"} <= row.keys()
        assert [sum(of_class) for of_class in row["test/confusion"]] == [10] * 10
        hits = sum(row["test/confusion"][c][c] for c in range(10))
        assert row["test/top1"] == pytest.approx(hits / 100)
        assert row["test/top1_by_class"] == [row["test/confusion"][c][c] / 10 for c in range(10)]
    for layer in (0, 2, 4):
        assert told[layer + 1]["test/relative_loss"] < told[layer]["test/relative_loss"] < 1.5
    assert output.splitlines()[-1].startswith("result: q2 frozen after 11 epochs: test loss ")


def test_folds_are_trained_one_after_another(smoke):
    told = rows(smoke[0] / "folds")
    assert [row["stage"] for row in told[7:]] == [f"fold {fold}" for fold in range(10)]


def test_a_run_draws_its_pictures(smoke):
    report = smoke[0] / "run/report"
    names = ["classes.png", "confusion.png", "filters.png", "reconstructions.png", "samples.png"]
    assert sorted(path.name for path in report.glob("*.png") if path.name != "curves.png") == names
    assert sorted(path.name for path in report.glob("*") if path.suffix != ".png") == [
        "gallery.npz", "index.csv", "index.html", "index.md"
    ]  # fmt: skip
    assert all((report / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_evaluate_repeats_the_last_figures_to_the_bit(smoke):
    code, output = call("evaluate", smoke[0] / "run")
    assert code == 0, output
    row = rows(smoke[0] / "run")[-1]
    for name in ("loss", "top1", "top5", "recall_at_1", "nearest_center"):
        assert f"{name}: {row[f'test/{name}']!r}" in output.splitlines()
    confusion = [line.split() for line in output.splitlines() if len(line.split()) == 10]
    assert [[int(n) for n in line] for line in confusion] == row["test/confusion"]


def test_report_prints_tables_and_draws_curves(smoke):
    code, output = call("report", smoke[0] / "run")
    assert code == 0, output
    assert all(word in output for word in ("frozen", "test top-1 of each class")), output
    assert "original study" not in output, "it was of other data"
    assert (smoke[0] / "run/report/curves.png").is_file()


def test_the_same_command_again_says_that_the_run_is_complete(smoke):
    before = rows(smoke[0] / "run")
    code, output = call("train", "q2", "--smoke", "--runs-dir", smoke[0], "--name", "run")
    assert code == 0, output
    assert "is complete" in output
    assert rows(smoke[0] / "run") == before


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_the_second_layer_goes_on_to_the_same_bits(stl_shards, tmp_path):
    arguments = ["--pretrain.epochs", "8", "--checkpoint-every", "2", "--finetune", "--model.norm", "batch"]
    code, output = train(stl_shards, tmp_path / "whole", *arguments)
    assert code == 0, output
    first, end = 8 * 6, 2 * 8 * 6  # steps of the second layer
    command = ["train", "q2", "--local", "--data.shards", stl_shards, "--runs-dir", tmp_path / "killed"]
    process = start(*command, *SMALL, *arguments)
    checkpoints = tmp_path / "killed/run/checkpoints"

    def step():
        return max((int(path.stem[5:]) for path in checkpoints.glob("step-*.pt")), default=0)

    assert wait_until(lambda: step() > first + 6, 60)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert first + 6 < step() < end - 6, "it was not killed in the middle of the second layer"
    assert torch.load(max(checkpoints.glob("step-*.pt")), weights_only=True)["stage"] == "layer 2"

    code, output = train(stl_shards, tmp_path / "killed", *arguments)
    assert code == 0, output
    assert " from step " in output
    assert rows(tmp_path / "killed/run") == rows(tmp_path / "whole/run")
    ours, theirs = (
        torch.load(max((tmp_path / name / "run/checkpoints").iterdir()), weights_only=True)["model"]
        for name in ("killed", "whole")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


MISTAKES = {
    "no such code": (["--model.code-layer", "128"], ["model.code_layer: 128", "[24, 16, 12]"]),
    "no units": (["--model.layers", "24", "0", "12"], ["model.layers", "0"]),
    "nested section": (["--pretrain.optimizer.lr", "-1"], ["pretrain.optimizer.lr", "-1"]),
    "section of q1": (["--triplet.margin", "1"], ["--triplet.margin"]),
    "loss of q1": (["--loss", "center"], ["--loss"]),
    "misspelt": (["--pretrain.epoch", "3"], ["--pretrain.epoch", "--pretrain.epochs"]),
    "batch too large": (["--global-batch-size", "100"], ["global_batch_size", "100", "80"]),
    "not a corruption": (["--pretrain.corruption", "salt"], ["salt", "masking"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, stl_shards, tmp_path):
    arguments, words = MISTAKES[mistake]
    code, output = train(stl_shards, tmp_path / "runs", *arguments)
    assert code == 2, output
    assert len(output.splitlines()) == 1
    assert all(word in output for word in words), output
    assert not list(tmp_path.rglob("*"))


def test_folds_where_there_are_none_are_refused(shapes_shards, tmp_path):
    code, output = train(shapes_shards, tmp_path / "runs", "--folds")
    assert (code, len(output.splitlines())) == (2, 1), output
    assert "names no folds" in output


def test_a_run_without_a_classifier_yet_cannot_be_evaluated(stl_shards, tmp_path):
    settings = Q2(runs_dir=str(tmp_path), name="run", data={"shards": str(stl_shards)}, global_batch_size=20)
    stop = iter([False, True])  # asked before an epoch, and after its first step
    with pytest.raises(KeyboardInterrupt):
        fit(settings, task="q2", stop=lambda: next(stop))
    code, output = call("evaluate", tmp_path / "run")
    assert (code, len(output.splitlines())) == (2, 1), output
    assert "no classifier yet" in output


def test_settings_of_another_size_of_image_are_refused(smoke, shapes_shards):
    code, output = call("evaluate", smoke[0] / "run", "--data.shards", shapes_shards)
    assert (code, len(output.splitlines())) == (2, 1), output
    assert "images of 32x32" in output


def test_rows_are_plain_json(smoke):
    for line in (smoke[0] / "run/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
