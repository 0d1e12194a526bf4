"""Runs that differ in the seed alone, and what is said of several."""

import statistics
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from dlops_dist.config import flat
from dlops_dist.recipes.q1 import Settings as Q1
from dlops_dist.report.compared import QUANTILES, differences, paired, records, sentences, table
from dlops_dist.report.runs import Reported, grouped
from dlops_dist.tables import markdown


def run(name, top1, seed=0, **settings):
    given = Q1(seed=seed, **settings)
    row = {"epoch": 1, "step": 1, "train/loss": 1.0, "test/loss": 2.0, "test/top1": top1, "test/top5": 0.9}
    return Reported(f"runs/{name}", name, given, [row], values=flat(given.model_dump()))


CE, CENTER = [0.40, 0.42, 0.41, 0.39], [0.45, 0.44, 0.46, 0.42]


def both(ce=CE, center=CENTER, **settings):
    return [run(f"{loss}-s{seed}", top1, seed, loss=loss, **settings)
            for loss, of in (("ce", ce), ("center", center)) for seed, top1 in enumerate(of)]  # fmt: skip


def test_runs_that_differ_in_the_seed_alone_are_one_row_with_mean_and_deviation():
    groups = grouped(both())
    assert [(group.label, list(group.runs)) for group in groups] == [("ce", [0, 1, 2, 3]), ("center", [0, 1, 2, 3])]
    ours = table(groups)
    shown = dict(zip(ours.columns, ours.rows[0], strict=True))
    assert (shown["seeds"], shown["test top-1"]) == ("4", f"{statistics.mean(CE):.2%} ± {statistics.stdev(CE):.2%}")
    first = records(groups)[0]
    assert first["test/top1"] == pytest.approx(np.mean(CE))
    assert first["test/top1 deviation"] == pytest.approx(np.std(CE, ddof=1))


def test_other_settings_and_the_same_seed_again_are_rows_of_their_own():
    runs = [run("a", 0.5), run("b", 0.5, seed=1), run("c", 0.5, seed=1), run("d", 0.5, optimizer={"lr": 0.5})]
    assert [[r.name for r in group.runs.values()] for group in grouped(runs)] == [["a", "b"], ["c"], ["d"]]
    only_its_place = [run("a", 0.5), run("b", 0.5, seed=1, workers=4, runs_dir="elsewhere")]
    assert len(grouped(only_its_place)) == 1


def test_paired_differences_are_those_of_a_paired_t_test():
    groups = grouped(both())
    found = paired(groups[1], groups[0], "test/top1")
    peer = stats.ttest_rel(CENTER, CE)
    interval = peer.confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx((0.0375, interval.low, interval.high), rel=1e-5)
    assert found.is_told
    assert peer.pvalue < 0.05
    assert [pytest.approx(stats.t.ppf(0.975, n + 1), abs=6e-6) for n in range(30)] == list(QUANTILES)


def test_seeds_that_only_one_has_are_left_out_and_two_in_common_say_nothing():
    groups = grouped([*both(CE, [0.9, 0.8]), run("center-s9", 0.1, 9, loss="center")])
    assert paired(*groups, "test/top1") is None
    assert differences(groups) == []
    assert "may well be chance" in " ".join(sentences(groups))


def test_differences_that_are_equal_by_chance_tell_nothing_apart():
    """Of a few test images, accuracies go by steps."""
    assert paired(*grouped(both([0.25, 0.5, 0.75], [0.5, 0.75, 1.0])), "test/top1").is_told is False


@pytest.mark.parametrize(
    ("center", "words", "unsaid"),
    [
        (CENTER, "ce is below center (-3.75, 95 % interval -6.14 to -1.36 points, 4 seeds)", "not told apart"),
        ([0.40, 0.41, 0.42, 0.40], "ce and center are not told apart", "above"),
    ],
)
def test_a_sentence_claims_no_more_than_the_interval_shows(center, words, unsaid):
    text = " ".join(sentences(grouped(both(center=center))))
    assert words in text
    assert unsaid not in text
    assert "of other images nothing is said" in text


def test_a_recipes_own_figure_is_compared_where_runs_are_chosen_by_it():
    runs = both(choose_by="val/mean_rank")
    for place, of in enumerate(runs):
        of.rows[0] |= {"test/mean_rank": 5.0 + place % 4 + (place // 4) * (1 + place % 2), "test/top1": None}
    (found,) = differences(grouped(runs))
    assert (found.name, found.mean) == ("test/mean_rank", -1.5)
    assert "By test mean_rank: ce is below center (-1.5000, 95 % interval -2.4187 to -0.5813, 4 seeds)." in sentences(
        grouped(runs)
    )


def test_runs_of_other_data_are_not_compared():
    elsewhere = [
        replace(run, place=f"other/{run.name}") for run in both([0.1] * 3, [0.9, 0.8, 0.7], data={"shards": "x"})
    ]
    groups = grouped([*both(), *elsewhere])
    assert sentences(groups)[0].startswith("These runs are of different data")
    compared = {(d.of, d.over) for d in differences(groups)}
    assert compared == {("runs/ce-s0", "runs/center-s0"), ("other/ce-s0", "other/center-s0")}


def test_a_bar_in_a_name_is_no_column_of_markdown():
    (group,) = grouped([run("a|b<script>", 0.5)])
    lines = markdown(table([group])).splitlines()
    assert len({line.replace(r"\|", "").count("|") for line in lines[2:]}) == 1
    assert "<script>" not in "".join(lines)
