"""Tables on terminals of any width."""

import io
import re

import pytest
from rich.console import Console

from dlops_dist.tables import Table, html, on_terminal

NAMES = ["run", "loss", "epoch", "train loss", "train top-1", "test loss", "test top-1", "test top-5",
         "test nearest centre", "test Recall@1", "test a_long_name_of_a_users_own"]  # fmt: skip
ROW = ["q1-center-0a1b2c3d", "center", "10", "1.2345", "50.21%", "1.5670", "48.30% ± 0.10%", "81.90% ± 1.40%",
       "47.30% ± 0.90%", "32.30% ± 1.00%", "0.1235"]  # fmt: skip
WIDE = Table("result of each run", NAMES, [ROW, ["other", *ROW[1:]]], 2)


def shown(table, width):
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(*on_terminal(table, width))
    return console.export_text()


@pytest.mark.parametrize("width", [60, 80, 120, 160])
def test_no_word_is_cut_and_nothing_is_wider_than_the_terminal(width):
    text = shown(WIDE, width)
    assert max(map(len, text.splitlines())) <= width
    cells = {cell.strip() for line in text.splitlines() for cell in re.split("[│┃]", line)}
    words = {word for cell in cells for word in cell.split()}
    assert {cell for cell in ROW if len(cell) <= width // 2} <= cells
    assert {word for name in NAMES for word in name.split() if len(word) <= width // 2} <= words


def test_a_table_that_fits_is_one_and_names_stand_beside_each_part_of_one_that_does_not():
    assert len(list(on_terminal(WIDE, 250))) == 1
    parts = list(on_terminal(WIDE, 80))
    assert len(parts) > 1
    for part in parts:
        assert [str(column.header) for column in part.columns[:2]] == ["run", "loss"]
    headers = [str(column.header) for part in parts for column in part.columns[2:]]
    assert headers == NAMES[2:]


def test_names_in_brackets_stay_as_they_are():
    assert "[red]x[/red]" in shown(Table("t", ["run"], [["[red]x[/red]"]]), 80)


def test_remarks_go_over_several_lines_at_words():
    told = "failed: the loss became nan at step 12 of epoch 3; lower optimizer.lr"
    text = shown(Table("ranking", ["", "lr", ""], [["1", "0.1", told]], remarks=True), 40)
    assert max(map(len, text.splitlines())) <= 40
    cells = " ".join(line.split("│")[3] for line in text.splitlines() if line.startswith("│"))
    assert cells.split() == told.split()


def test_a_cell_is_no_html():
    text = html(Table("<b>", ["<i>"], [["<script>alert(1)</script>"]]))
    assert "<script>" not in text
    assert "<b>" not in text
    assert "<i>" not in text
