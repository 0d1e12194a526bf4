"""What an installation gets: the wheel and the sdist, their metadata, and commands by name."""

import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from hatchling import build

import dlops_dist
from dlops_dist import commands

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return built(ROOT, tmp_path_factory.mktemp("wheel"))


def built(project, folder):
    """The wheel of a source tree."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        return zipfile.ZipFile(folder / build.build_wheel(str(folder)))


def test_the_wheel_holds_the_package_its_configs_and_its_types_and_nothing_else(wheel):
    names = set(wheel.namelist())
    inside = {name for name in names if not name.startswith("dlops_dist-")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "dlops_dist").rglob("*.py")}
    configs = {f"dlops_dist/configs/{path.name}" for path in (ROOT / "configs").iterdir()}
    assert inside == modules | configs | {"dlops_dist/py.typed"}
    assert {name.partition("/")[2] for name in names - inside} == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE",
    }  # fmt: skip


def test_its_metadata_say_who_may_use_it_and_where_it_runs(wheel):
    metadata = Parser().parsestr(wheel.read(next(n for n in wheel.namelist() if n.endswith("/METADATA"))).decode())
    assert (metadata["Name"], metadata["Version"]) == ("dlops_dist", dlops_dist.__version__)
    assert (metadata["License-Expression"], metadata["Requires-Python"]) == ("Apache-2.0", ">=3.11")
    assert metadata.get_payload() == (ROOT / "README.md").read_text()


def test_version_and_licence_are_the_same_wherever_they_stand():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (PROJECT["version"], PROJECT["license"]) == (citation["version"], citation["license"])
    assert f"\n## {dlops_dist.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_an_sdist_makes_the_same_wheel_and_holds_no_test(wheel, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / build.build_sdist(str(tmp_path))) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert {"LICENSE", "README.md", "configs", "examples", "docs", "launch"} <= {path.name for path in tree.iterdir()}
    assert not [path for path in tree.rglob("*") if path.name.startswith("test_")]
    again = built(tree, tmp_path)
    assert {i.filename: i.CRC for i in again.infolist()} == {i.filename: i.CRC for i in wheel.infolist()}


def test_each_module_that_is_a_command_is_on_the_path():
    package = ROOT / "dlops_dist"
    modules = [path.stem for path in package.glob("*.py") if '__name__ == "__main__"' in path.read_text()]
    modules += [path.parent.name for path in package.glob("*/__main__.py")]
    assert PROJECT["scripts"] == {f"dlops-{name}": "dlops_dist.commands:main" for name in modules}
    assert all(callable(import_module(f"dlops_dist.{name}").main) for name in modules)


def test_a_command_runs_what_it_is_named_after(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/dlops-evaluate", str(tmp_path / "none")])
    assert commands.main() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'none'}")
    assert len(error.splitlines()) == 1
