"""What a terminal of any width shows of a run."""

import io
import re

import pytest
from rich.console import Console as RichConsole

from dlops_dist import console
from dlops_dist.events import Stepped, Told

TOLD = "a notice of some length with a path in it, /data/of/somebody/and/of/nobody/that/is/not/to/be/cut/in/two, it is"


@pytest.fixture
def shown(monkeypatch):
    """What a terminal of a width gets of a step in a run of ten epochs."""

    def at(width, **options):
        monkeypatch.setattr(console, "RichConsole", lambda **given: RichConsole(
            **given, **options, force_terminal=True, width=width, file=io.StringIO()))  # fmt: skip
        with console.Console() as run:
            run(Told(TOLD))
            run._epochs = 10
            run.live.start()
            run._task = run.live.add_task("starting", total=12500, completed=0, figures="")
            run(Stepped(10, 12345, 345, 1250, 4.12345, 0.123, 12345.0))
            run.live.refresh()
            return run.out.file.getvalue()

    return at


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_bar_stays_and_no_word_is_cut(width, shown):
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(width)).replace("\r", "\n").splitlines()
    bar = max((line for line in lines if "━" in line), key=len)
    assert len(bar) <= width
    assert bar.count("━") >= 9
    assert all(words in bar for words in ("epoch 10/10", "loss 4.1235", "top-1 12.3%"))
    assert ("12,345 images/s" in bar) == (width >= 100)
    told = [line for line in lines if line and "━" not in line]
    assert " ".join(" ".join(told).split()).startswith(TOLD)
    assert all(len(line) <= width or " " not in line.strip() for line in told)


def test_no_color_is_honoured(shown, monkeypatch):
    assert re.search(r"\x1b\[[0-9;]*3\d", shown(80))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-8]", shown(80))
