"""The points of a sweep, its settings and its ranking: pure functions, and a folder."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dlops_dist.command_line import read_settings, read_sweep
from dlops_dist.config import (
    SHIPPED,
    Parameter,
    Point,
    Sweep,
    Value,
    check_sweep,
    flat,
    load_recipe,
    result_settings,
    trial_settings,
)
from dlops_dist.ray_tuner import trials_at_once
from dlops_dist.report.printing import Printed
from dlops_dist.report.writing import write_sweep
from dlops_dist.sweep.board import Board, best_line
from dlops_dist.sweep.folder import Ranked, SweepFolder, Trial, gain_of, importance
from dlops_dist.sweep.folder import ranking as ranking_by
from dlops_dist.sweep.points import points_of, suggest
from dlops_dist.tune import run_sweep

MARGIN = Parameter.parse("triplet.margin uniform 0.1 1.0")
LR = Parameter.parse("optimizer.lr log-uniform 0.003 0.3")
MOMENTUM = Parameter.parse("optimizer.momentum choice 0.0 0.5 0.9")
SIZE = Parameter.parse("global-batch-size grid 32 64")


def sweep(*arguments: str) -> Sweep:
    return read_sweep("q1", arguments)


def test_points_are_the_same_again_within_their_intervals_and_more_of_them_begin_with_the_same() -> None:
    points = points_of([MARGIN, LR, MOMENTUM], 40, seed=3)
    assert points == points_of([MARGIN, LR, MOMENTUM], 40, seed=3)
    assert points[:7] == points_of([MARGIN, LR, MOMENTUM], 7, seed=3)
    assert points != points_of([MARGIN, LR, MOMENTUM], 40, seed=4)
    assert all(0.1 <= point["triplet.margin"] <= 1.0 and 0.003 <= point["optimizer.lr"] <= 0.3 for point in points)
    assert {point["optimizer.momentum"] for point in points} == {0.0, 0.5, 0.9}
    assert 0.3 < np.mean([point["optimizer.lr"] < 0.03 for point in points]) < 0.7, "half of them lie below the middle"


def test_a_parameters_draws_do_not_depend_on_what_else_is_searched() -> None:
    alone = points_of([LR], 9, seed=0)
    assert [p["optimizer.lr"] for p in points_of([MARGIN, LR, SIZE], 9, seed=0)][::2] == [
        p["optimizer.lr"] for p in alone
    ]


def test_every_combination_of_the_grids_is_tried_with_each_draw_and_none_twice() -> None:
    momentum = Parameter.parse("optimizer.momentum grid 0.5 0.9")
    points = points_of([SIZE, LR, momentum], 3, seed=0)
    assert len(points) == 12
    assert list(points[0]) == ["global_batch_size", "optimizer.lr", "optimizer.momentum"]
    assert len(points_of([SIZE, momentum], 3, seed=0)) == 4
    assert len(points_of([MOMENTUM], 50, seed=0)) == 3


@given(st.floats(0, 1, exclude_max=True), st.floats(1e-6, 1e3), st.floats(1.001, 1e6))
def test_draws_stay_between_the_ends(part: float, low: float, factor: float) -> None:
    for kind in ("uniform", "log-uniform"):
        value = Parameter.parse(f"optimizer.lr {kind} {low!r} {low * factor!r}").at(part)
        assert low <= value <= low * factor


@pytest.mark.parametrize(
    ("workers", "wanted", "places", "at_once"),
    [(None, None, 2, 2), (1, None, 2, 2), (2, None, 2, 1), (2, None, 7, 3), (1, 3, 8, 3), (None, None, 99, 12)],
)
def test_as_many_trials_at_once_as_all_find_their_workers(workers: Any, wanted: Any, places: int, at_once: int) -> None:
    given = sweep().model_copy(update={"workers": workers, "concurrency": wanted})
    assert trials_at_once(given, 12, places) == at_once


def test_too_few_places_for_workers_are_refused(user_error: Callable) -> None:
    with user_error("workers", "3", "2"):
        trials_at_once(sweep("--workers", "3"), 12, 2)
    with user_error("concurrency: 4", "8", "--concurrency 3"):
        trials_at_once(sweep("--workers", "2", "--concurrency", "4"), 12, 7)


SPACES = {
    "optimizer.lr": ["optimizer.lr", "SETTING grid|choice|uniform|log-uniform VALUE"],
    "optimizer.lr normal 0 1": ["optimizer.lr normal 0 1", "log-uniform"],
    "optimizer.lr uniform 1": ["optimizer.lr uniform 1", "two numbers"],
    "optimizer.lr uniform 2 1": ["the lesser first"],
    "optimizer.lr uniform 0 inf": ["two numbers"],
    "optimizer.lr uniform low high": ["two numbers"],
    "optimizer.lr log-uniform 0 1": ["above 0"],
    "optimizer.lr grid 0.1 -1": ["optimizer.lr", "-1", "greater than 0"],
    "optimizer.lr uniform -1 1": ["optimizer.lr", "-1", "greater than 0"],
    "optimizer.rl grid 1": ["optimizer.rl", "did you mean optimizer.lr"],
    "epochs.x grid 1": ["epochs.x", "no such setting"],
    "seed grid 1 2": ["seed"],
    "workers grid 1 2": ["workers"],
    "concurrency grid 1 2": ["concurrency"],
    "data.val-fraction grid 0.1 0.2": ["data.val_fraction"],
    "center.weight grid 0.1": ["center.weight", "--loss triplet"],
    "choose-by choice val/loss val/top1": ["choose_by"],
}


@pytest.mark.parametrize("space", SPACES)
def test_a_space_that_makes_no_sense_is_one_line(space: str, user_error: Callable) -> None:
    with user_error(*SPACES[space]):
        check_sweep(sweep("--space", space))


MISTAKES = {
    "--data.val-fraction 0": ["data.val_fraction", "--data.val-fraction 0.1"],
    "--choose-by test/top1": ["choose_by: 'test/top1'", "a figure of val/"],
    "--local": ["local"],
    "--patience 2": ["patience", "--scheduler asha"],
    "--workers 2 --min-workers 3": ["min_workers: 3", "2 workers"],
    "--runs-dir s3://bucket/runs": ["runs_dir", "s3://bucket/runs"],
    "--loss center": ["triplet.margin", "--loss center"],
    "--scheduler pbt": ["pbt", "asha"],
    "--scheduler asha --epochs 1": ["asha", "1 epoch"],
    "--search optuna --space": ["space"],
    "--num-samples 0": ["num_samples", "0"],
    "--optimizer.rl 3": ["--optimizer.rl", "--optimizer.lr"],
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_line(arguments: str, user_error: Callable) -> None:
    with user_error(*MISTAKES[arguments]):
        check_sweep(sweep(*arguments.split()))


def test_a_setting_twice_and_a_grid_for_optuna_are_refused(user_error: Callable) -> None:
    with user_error("optimizer.lr is there twice"):
        check_sweep(sweep("--space", "optimizer.lr grid 1", "optimizer.lr grid 2"))
    with user_error("optimizer.lr grid", "choice"):
        check_sweep(sweep("--search", "optuna", "--space", "optimizer.lr grid 1"))
    with user_error("folds"):
        check_sweep(read_sweep("q2", ["--folds"]))


def test_a_sweep_in_what_ray_uploaded_for_a_job_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user_error: Callable
) -> None:
    uploaded = tmp_path / "working_dir_files/package"
    uploaded.mkdir(parents=True)
    monkeypatch.chdir(uploaded)
    with user_error("runs_dir: runs", "absolute path"):
        run_sweep("q1", sweep())


@pytest.mark.parametrize("task", SHIPPED)
@pytest.mark.parametrize("arguments", [[], ["--smoke"]])
def test_what_is_shipped_is_a_sweep(task: str, arguments: list[str]) -> None:
    shipped = read_sweep(task, arguments)
    check_sweep(shipped)
    assert "optimizer.lr" in [parameter.name for parameter in shipped.parameters]
    assert shipped.smoke == bool(arguments)


def test_a_trial_has_the_settings_of_the_sweep_but_for_its_point_and_seed() -> None:
    given = sweep("--epochs", "3", "--model.width", "16", "--name", "mine")
    settings = trial_settings(given, {"optimizer.lr": 0.2, "triplet.margin": 0.3, "global_batch_size": 63.7}, seed=5)
    changed = {"optimizer.lr": 0.2, "triplet.margin": 0.3, "global_batch_size": 64, "seed": 5}
    own = ("space", "search")
    assert result_settings(settings) == {k: v for k, v in result_settings(given).items() if k not in own} | changed
    assert settings.name is None


def test_draws_for_a_setting_of_whole_numbers_are_rounded_and_none_is_trained_twice(
    shapes_shards: Path, tmp_path: Path
) -> None:
    assert trial_settings(sweep(), {"data.samples_per_class": 4.37}, seed=0).data.samples_per_class == 4
    assert trial_settings(sweep(), {"center.alpha": 0.37}, seed=0).center.alpha == 0.37
    given = sweep("--data.shards", str(shapes_shards), "--space", "augment.crop_padding uniform 0 3", "--seeds", "2")
    names = [settings.name for settings in SweepFolder(tmp_path, "q1", given).known_trials()]
    assert len(names) == len(set(names)) == 8


def test_a_sweep_is_read_again_from_what_was_written(tmp_path: Path) -> None:
    given = sweep("--num-samples", "3", "--seeds", "2", "--scheduler", "asha", "--space", "optimizer.lr grid 0.1 0.2")
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"task": "q1", **given.model_dump()}))
    again = flat(sweep("--config", str(file)).model_dump())
    assert again == flat(given.model_dump()) | {"config": str(file)}


def trial(point: Point, *scores: float | None, seed: int = 0, epochs: int = 3, failed: str | None = None) -> Trial:
    return Trial("name", point, seed, list(scores), epochs, failed, stopped=False)


def ranking(trials: list[Trial], choose_by: str = "val/top1") -> list[Ranked]:
    return ranking_by(trials, choose_by)


def test_points_are_ranked_by_epochs_reached_then_by_the_mean_of_their_seeds() -> None:
    ranked = ranking([
        trial({"lr": 1}, 0.1, 0.2, 0.5), trial({"lr": 1}, 0.1, 0.2, 0.3, seed=1),
        trial({"lr": 2}, 0.9, 0.1, 0.42), trial({"lr": 2}, 0.1, 0.1, 0.42, seed=1),
        trial({"lr": 3}, 0.9, 0.9), trial({"lr": 3}, 0.9, 0.9, 0.9, seed=1),
        trial({"lr": 4}, failed="the loss became nan"),
    ])  # fmt: skip
    assert [point.point["lr"] for point in ranked] == [2, 1, 3, 4]
    assert ranked[0].mean == pytest.approx(0.42)
    assert ranked[1].deviation == pytest.approx(math.sqrt(0.02))
    assert [point.finished for point in ranked] == [True, True, False, False]
    assert (ranked[3].mean, ranked[3].deviation, ranked[3].epochs) == (None, None, 0)


def test_of_a_loss_the_lowest_is_best_and_what_cannot_be_is_worst() -> None:
    def best_first(choose_by: str) -> list[Value]:
        trials = [trial({"lr": 1}, 0.3), trial({"lr": 2}, 0.1), trial({"lr": 3}, None), trial({"lr": 4}, 0.2)]
        return [point.point["lr"] for point in ranking(trials, choose_by)]

    assert best_first("val/loss") == [2, 4, 1, 3]
    assert best_first("val/mean_rank") == [1, 4, 2, 3]


MINE = """
from dlops_dist import Run, Section

class Head(Section):
    \"""The head.\"""
    scale: float = 1.0
    parts: int | None = None

class Settings(Run):
    \"""Mine.\"""
    width: int = 8
    head: Head = Head()

def recipe(settings, inputs): ...
"""


def test_a_users_settings_are_a_space_too(tmp_path: Path, user_error: Callable) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    space = ["head.scale uniform 0.5 2", "width log-uniform 4 64", "head.parts uniform 1 9"]

    def mine(*space: str) -> Sweep:
        return read_sweep(str(file), ["--data.val-fraction", "0.1", "--space", *space])

    check_sweep(mine(*space))
    settings = trial_settings(mine(*space), {"head.scale": 0.7, "width": 31.6, "head.parts": 2.2}, seed=3)
    assert type(settings) is load_recipe(str(file)).settings_type
    assert settings.model_dump(include={"head", "width", "seed"}) == {
        "head": {"scale": 0.7, "parts": 2}, "width": 32, "seed": 3,
    }  # fmt: skip
    with user_error("head.scales", "did you mean head.scale"):
        check_sweep(mine("head.scales grid 1"))
    with user_error("width", "wide"):
        check_sweep(mine("width grid wide"))


@pytest.fixture
def swept(tmp_path: Path) -> Callable:
    """The folder of a sweep of q2, whose points have these rows of the classifier, after one of each layer."""

    def written(choose_by: str, rows: dict[float, list[dict[str, Any]]]) -> SweepFolder:
        space = ["--space", f"optimizer.lr grid {' '.join(map(str, rows))}", "--choose-by", choose_by]
        given = read_sweep("q2", [*space, "--model.layers", "4", "--model.code-layer", "4", "--epochs", "2"])
        SweepFolder(tmp_path, "q2", given).create()
        for lr, told in rows.items():
            values = {"task": "q2", **trial_settings(given, {"optimizer.lr": lr}, 0).model_dump()}
            pretrained = {"step": 1, "stage": "layer 1", "val/loss": 0.001, "test/loss": 0.001}
            before = [{**pretrained, "epoch": epoch} for epoch in range(1, given.pretrain.epochs + 1)]
            after = [{"epoch": len(before) + 1 + i, "step": 2, "stage": "classifier", **r} for i, r in enumerate(told)]
            (tmp_path / f"lr-{lr}").mkdir()
            (tmp_path / f"lr-{lr}/config.yaml").write_text(yaml.safe_dump(values))
            (tmp_path / f"lr-{lr}/metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in before + after))
        return SweepFolder.open(tmp_path)

    return written


def of(**figures: float | None) -> dict[str, Any]:
    return {f"{split}/{name}": value for split in ("val", "test") for name, value in figures.items()}


CHOICES = {
    "val/top1": (0.2, "val top-1", "80.00%", "val top-1 80.00%, test top-1 80.00% (one seed)"),
    "val/loss": (0.1, "val loss", "0.2000", "val loss 0.2000, test loss 0.2000 (one seed)"),
    "val/mean_rank": (0.3, "val mean_rank", "0.4000", "val mean_rank 0.4000, test mean_rank 0.4000 (one seed)"),
}


@pytest.mark.parametrize("choose_by", CHOICES)
def test_the_held_out_figure_that_is_named_chooses_the_best_point(choose_by: str, swept: Callable) -> None:
    lr, name, shown, line = CHOICES[choose_by]
    folder = swept(choose_by, {
        0.1: [of(top1=0.1, loss=0.9, mean_rank=0.1), of(top1=0.5, loss=0.2, mean_rank=None)],
        0.2: [of(top1=0.9, loss=0.1, mean_rank=0.9), of(top1=0.8, loss=0.7, mean_rank=0.3)],
        0.3: [of(top1=0.1, loss=0.9, mean_rank=0.1), of(top1=0.1, loss=0.8, mean_rank=0.4)],
        0.4: [of(top1=1.0, loss=0.0, mean_rank=1.0)],
    })  # fmt: skip
    assert len(folder.trial("lr-0.4").scores) == 1, "pretraining is not judged"
    output = Console(width=200, record=True, file=io.StringIO())
    best = write_sweep(folder, Printed(console=output))
    assert best is not None
    assert (best.point, best_line(folder, best)) == ({"optimizer.lr": lr}, f"optimizer.lr {lr}: {line}")
    text = output.export_text()
    assert all(words in text for words in (f" {name} ", shown, f"variance of {name} over 3 points")), text
    files = ["index.csv", "index.html", "index.md", "parallel.png", "responses.png"]
    assert sorted(path.name for path in (folder.path / "report").iterdir()) == files
    again = read_settings("q2", ["--config", str(folder.write_best(best.point))])
    assert (again.choose_by, again.optimizer.lr) == (choose_by, lr)


def test_the_board_tells_what_a_trial_is_compared_by(swept: Callable, capsys: pytest.CaptureFixture) -> None:
    folder = swept("val/mean_rank", {0.1: [of(mean_rank=None)], 0.2: [of(mean_rank=0.25)]})
    with Board(folder) as board:
        for name in ("lr-0.1", "lr-0.2"):
            board.started(name)
            board.judged(name)
        board.ended("lr-0.1")
        board.ended("lr-0.2", died="its process died")
    assert capsys.readouterr().out.splitlines() == [
        "lr-0.1 starts: optimizer.lr 0.1, seed 0", "lr-0.1 epoch 1/2: val mean_rank -",
        "lr-0.2 starts: optimizer.lr 0.2, seed 0", "lr-0.2 epoch 1/2: val mean_rank 0.2500",
        "lr-0.1 ends at epoch 1, given up by the scheduler",
        "warning: lr-0.2 failed: its process died", "lr-0.2 ends at epoch 1",
    ]  # fmt: skip


def test_a_figure_that_no_row_has_is_one_line(user_error: Callable) -> None:
    row = {"epoch": 1, **of(top1=0.5, loss=0.1), "val/top1_by_class": [0.5]}
    assert gain_of(sweep("--choose-by", "val/loss"), row) == -0.1
    with user_error("choose_by: val/recall is none of the figures", "which are val/top1, val/loss"):
        gain_of(sweep("--choose-by", "val/recall"), row)


def scored(parameters: list[Parameter], number: int, score: Callable[[Point], float]) -> list[Trial]:
    return [trial(point, score(point), epochs=1) for point in points_of(parameters, number, seed=0)]


def test_importance_finds_a_hidden_optimum_and_what_does_not_matter() -> None:
    noise = np.random.default_rng(0)

    def score(point: Point) -> float:
        return 0.5 - 0.1 * math.log10(point["optimizer.lr"] / 0.03) ** 2 + 0.01 * noise.normal()

    ranked = ranking(scored([LR, MARGIN, MOMENTUM], 40, score))
    assert importance(LR, ranked) > 0.8
    assert importance(MARGIN, ranked) < 0.2
    assert importance(MOMENTUM, ranked) < 0.3


def test_importance_of_a_list_is_that_of_its_groups_means() -> None:
    ranked = ranking(
        scored([LR, MOMENTUM], 40, lambda point: {0.0: 0.1, 0.5: 0.9, 0.9: 0.1}[point["optimizer.momentum"]])
    )
    assert importance(MOMENTUM, ranked) == pytest.approx(1.0)


def test_importance_says_nothing_of_few_or_equal_points() -> None:
    assert importance(LR, []) is None
    assert importance(LR, ranking(scored([LR], 4, lambda point: point["optimizer.lr"]))) is None
    assert importance(LR, ranking(scored([LR], 20, lambda point: 0.5))) is None
    assert importance(MOMENTUM, ranking(scored([LR, MOMENTUM], 6, lambda p: p["optimizer.lr"]))) is not None


def test_optuna_suggests_the_same_again_and_comes_closer_to_the_optimum() -> None:
    def score(point: Point) -> float:
        return -abs(math.log10(point["optimizer.lr"] / 0.03)) - (point["optimizer.momentum"] != 0.9)

    def tried() -> list[Point]:
        points: list[Point] = []
        for attempt in range(40):
            points.append(suggest([LR, MOMENTUM], [(point, score(point)) for point in points], seed=attempt))
        return points

    points = tried()
    assert points == tried()
    assert all(0.003 <= point["optimizer.lr"] <= 0.3 for point in points)
    early, late = (np.mean([score(point) for point in part]) for part in (points[:10], points[-10:]))
    assert late > early
