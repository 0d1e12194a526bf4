"""Charts of a page: numbers on axes, lines with gaps, what is escaped."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlops_dist.figures import Line, Panel
from dlops_dist.report.charts import _numbered, chart, ticks


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e3))
def test_round_values_lie_between_the_ends_and_are_written_apart(low, part):
    high = low + max(abs(low), 1e-9) * part
    values = ticks(low, high)
    assert 1 <= len(values) <= 6
    slack = (high - low) * 1e-6
    assert all(low - slack <= value <= high + slack for value in values)
    texts = list(_numbered(values).values())
    assert len(set(texts)) == len(texts)
    for value, text in zip(values, texts, strict=True):
        assert float(text.replace(",", "")) == pytest.approx(value, abs=(high - low) / 50)


def drawn(*points, **options):
    return chart(Panel("<b>", [Line("a & b", points)], **options))


def test_a_line_has_a_gap_where_there_is_no_value():
    text = drawn((1, 1.0), (2, math.nan), (3, 2.0), (4, 3.0))
    (path,) = re.findall("class='line c0' d='(.*?)'", text)
    assert (path.count("M"), path.count("L")) == (2, 1)
    assert text.count("<circle") == 3
    assert "<b>" not in text
    assert "a &amp; b" in text


@pytest.mark.parametrize("points", [[(1, 5.0)], [(1, 0.0), (2, 0.0)], [(1, 1e-12), (2, 1e12)]])
def test_any_values_are_drawn(points):
    for log in (False, True):
        if all(y > 0 for _, y in points) or not log:
            numbers = [
                float(n)
                for n in re.findall("[ M]([-0-9.]+)", "".join(re.findall(" d='(.*?)'", drawn(*points, log=log))))
            ]
            assert all(0 <= number <= 420 for number in numbers)


def test_long_lines_are_thinned_to_their_last_point():
    text = drawn(*((x, float(x)) for x in range(5000)), x="step")
    (path,) = re.findall("class='line c0' d='(.*?)'", text)
    assert path.count("L") <= 401
    assert float(path.rsplit("L", 1)[1].split()[0]) == 408
