"""What README.md shows to a newcomer, done: from packing to an exported model and a recipe of one's own."""

import re
import shlex

import pytest
from command import ROOT, call
from PIL import Image

TEXT = (ROOT / "README.md").read_text().partition("## Scaling out")[0]


@pytest.mark.slow
def test_the_commands_and_lines_of_the_readme_do_what_they_say(tmp_path, monkeypatch):
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^dlops-.*", TEXT, re.MULTILINE)]
    assert [name for name, *_ in commands] == [
        "dlops-shard", "dlops-train", "dlops-evaluate", "dlops-report", "dlops-predict", "dlops-embed", "dlops-export",
        "dlops-train", "dlops-verify",
    ]  # fmt: skip
    used, recipe = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "my.py").write_text(recipe)
    Image.new("RGB", (80, 60), "teal").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    commands[1] += ["--epochs", "1"]
    for name, *arguments in commands[:-1]:  # verify has tests of its own
        code, output = call(name.removeprefix("dlops-"), *arguments)
        assert code == 0, output
    assert list((tmp_path / "runs/quickstart/report").iterdir())
    assert (tmp_path / "runs/quickstart/export/quickstart.pt2").is_file()

    *lines, predicted, embedded = used.splitlines()
    names = {}
    exec("\n".join(lines), names)
    ((best, second, _),) = eval(predicted, names)
    assert {best[0], second[0]} <= {*names["model"].classes}
    assert best[1] >= second[1]
    assert eval(embedded, names).shape == (1, 128)
