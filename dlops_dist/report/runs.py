"""Runs as they are reported: what their folders hold, and which of them differ in the seed alone."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from dlops_dist.config import LATER, MAY_CHANGE, Run, flat, is_loaded, load_recipe
from dlops_dist.config.yaml_file import parse_yaml
from dlops_dist.data.shards import read_manifest
from dlops_dist.engine.gallery import FILE, Gallery, look_again
from dlops_dist.engine.rows import result_row
from dlops_dist.engine.run_folder import CONFIG, STEPS, RunFolder
from dlops_dist.errors import UserError
from dlops_dist.files import Folder

MATRIX = 2000
"""Classes at most whose confusion is drawn."""
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Reported:
    """A run with at least one epoch."""

    place: str
    name: str
    settings: Run
    rows: list[dict[str, Any]]
    published: tuple[str, dict[str, float]] | None = None
    """What a study called its figures of the same data and loss, and these; None where there are none."""
    by_class: Sequence[float] | None = None
    """Class-wise accuracies that its recipe has published figures of; empty where those are of other data."""
    values: dict[str, Any] = field(default_factory=dict)
    """All settings, by dotted names, as its config.yaml has them: those of a recipe that is not at hand among them."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    gallery: Gallery | str = "there are none"
    """What its result makes of test images, or why that is not known."""
    pictures: dict[str, bytes] = field(default_factory=dict)
    """PNG files of its report/, by their names without the ending."""

    @property
    def result(self) -> dict[str, Any]:
        """The row that is the run's result."""
        return result_row(self.rows, self.settings.choose_by)

    @property
    def facts(self) -> dict[str, Any]:
        """Of its data, and of what trained it."""
        return self.gallery.facts if isinstance(self.gallery, Gallery) else {}

    @cached_property
    def data(self) -> str:
        """What tells its data from others."""
        return str(self.facts.get("dataset_id") or _id_of(Path(self.settings.data.shards)))

    @property
    def own(self) -> dict[str, Any]:
        """The settings that change the result, but for the seed."""
        found = {n: v for n, v in self.values.items() if n not in MAY_CHANGE and (n not in LATER or v != LATER[n])}
        return {name: value for name, value in found.items() if name != "seed"}


def load(place: str, recipe: str | None = None, tell: Tell | None = None) -> Reported:
    """A run, by its folder.

    Args:
        recipe: of a run of a user's recipe: its file, or its module's name.
        tell: where test images may be looked at anew, if nobody did at the run's end; takes a word on that.
    """
    folder = RunFolder(place)
    task, settings = folder.settings()
    rows = folder.rows()
    if not rows:
        raise UserError(f"{place} has no finished epoch yet; train it, or leave it out")
    study: Any = load_recipe(task).module if is_loaded(task) else None
    published = getattr(study, "STUDY", {})
    figures = settings.variant if settings.variant in published else next(iter(published), "")
    same_data = bool(published) and is_of_the_study(study.STUDY_DATA, Path(settings.data.shards), rows)
    by_class = getattr(study, "STUDY_CLASSES", None)
    values = {"task": task, **flat(parse_yaml(CONFIG, folder.read(CONFIG) or b""))}
    return Reported(
        place, folder.name, settings, rows, (figures, published[figures]) if same_data else None,
        by_class if by_class is None or same_data else (), values, _steps(folder), _gallery(folder, recipe, tell),
        _pictures(folder.folder / "report"),
    )  # fmt: skip


def _gallery(folder: RunFolder, recipe: str | None, tell: Tell | None) -> Gallery | str:
    """That of the run's report/, where it is there and whole; else a new one, where that may be."""
    report = folder.folder / "report"
    why = "none were looked at when the run ended"
    if FILE in report.names():
        with report.open(FILE) as file:
            try:
                return Gallery.of(file.read())
            except ValueError as error:
                why = str(error)
    if tell is None or not folder.checkpoints.steps():
        return why
    tell(f"{folder}: its result looks at test images")
    try:
        gallery = look_again(str(folder), recipe)
        with report.as_path() as path:
            gallery.save(path)
    except UserError as error:
        return str(error)
    except OSError:  # it stays in this page
        pass
    return gallery


def _steps(folder: RunFolder) -> list[dict[str, Any]]:
    """Rows of steps; lines that are none are passed over."""
    found = []
    for line in (folder.read(STEPS) or b"").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int | float):
            found.append(row)
    return found


def _pictures(report: Folder) -> dict[str, bytes]:
    found = {}
    for name in report.names():
        if name.endswith(".png"):
            with report.open(name) as file:
                found[name.removesuffix(".png")] = file.read()
    return found


def _id_of(shards: Path) -> str:
    """Of the data in a folder of shards; the folder itself where they are not there any more."""
    try:
        return read_manifest(shards).id
    except UserError:
        return str(shards)


def is_of_the_study(studied: tuple[str, int], shards: Path, rows: list[dict[str, Any]]) -> bool:
    """Whether a run's shards, where they are still there, hold all of a dataset of so many classes, in its own size."""
    try:
        manifest = read_manifest(shards)
    except UserError:
        return False
    whole = manifest.packing.get("limit") is None and manifest.packing.get("size") is None
    judged = {len(by_class) for row in rows if (by_class := row.get("test/top1_by_class"))}
    return whole and {(manifest.dataset, n) for n in judged | {len(manifest.classes)}} == {studied}


def confusion_of(gallery: Gallery | str) -> np.ndarray | None:
    """(C, C) how many test images of a class (row) were taken for which (column); None where that is not known."""
    if isinstance(gallery, str) or len(gallery.classes) > MATRIX:
        return None
    judged = gallery.predicted >= 0
    counts = np.zeros((len(gallery.classes),) * 2, np.int64)
    np.add.at(counts, (gallery.labels[judged], gallery.predicted[judged]), 1)
    return counts if judged.any() else None


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone, by their seeds."""

    label: str
    runs: dict[int, Reported]

    @property
    def first(self) -> Reported:
        return next(iter(self.runs.values()))

    def values(self, name: str) -> dict[int, float]:
        """A figure of each run's result, by seeds; of those that have it."""
        found = {seed: run.result.get(name) for seed, run in self.runs.items()}
        return {seed: value for seed, value in found.items() if isinstance(value, int | float)}


def grouped(runs: Sequence[Reported]) -> list[Group]:
    """In the order of their first runs. A seed that comes twice is not counted twice: it begins a row of its own."""
    found: list[tuple[str, dict[int, Reported]]] = []
    for run in runs:
        key = json.dumps([run.own, run.data, [] if run.own else run.place], sort_keys=True, default=str)
        own = next((of for known, of in found if known == key and run.settings.seed not in of), None)
        if own is None:
            own = {}
            found.append((key, own))
        own[run.settings.seed] = run
    labels = [_label([run.name for run in own.values()]) for _, own in found]
    groups = []
    for label, (_, own) in zip(labels, found, strict=True):
        first = next(iter(own.values()))
        taken = labels.count(label) > 1
        groups.append(Group(f"{first.place if taken else label}", dict(sorted(own.items()))))
    return groups


def _label(names: Sequence[str]) -> str:
    """A run's name; of several, what they begin with alike."""
    if len(names) == 1:
        return names[0]
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return re.sub(r"[-_.=]*(seed|s)?[-_.=]*$", "", "".join(letters[0] for letters in alike)) or f"{names[0]} ..."
