"""Reports as files: a page, tables of the same figures beside it, and pictures."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dlops_dist.errors import UserError
from dlops_dist.figures import Panel
from dlops_dist.files import Folder, is_url, make_writable
from dlops_dist.report import compared
from dlops_dist.report.of_run import run_page
from dlops_dist.report.of_runs import runs_page
from dlops_dist.report.of_sweep import sweep_page, sweep_records
from dlops_dist.report.panels import epoch_panels, overlaid
from dlops_dist.report.printing import Printed, Record, as_csv, as_markdown
from dlops_dist.report.runs import Reported, confusion_of, grouped, load
from dlops_dist.sweep.board import importance_table, ranking_table
from dlops_dist.sweep.folder import Ranked, SweepFolder
from dlops_dist.tables import Table
from dlops_dist.trackers import log_report

DRAWN_AFTER_S = 100


class Place(NamedTuple):
    """Where a report goes."""

    folder: Folder
    stem: str
    pictures: Folder

    @classmethod
    def of(cls, given: str | None, usual: Folder) -> "Place":
        """FILE.html, beside it FILE.md, FILE.csv and the pictures in FILE_files/; by default index.html in a folder of
        its own, the pictures in it.

        Raises:
            UserError: nothing can be written there.
        """
        folder, stem, pictures = usual, "index", usual
        if given is not None:
            parent, name = os.path.split(given)
            if not name.endswith(".html"):
                raise UserError(f"--html: {given} must end in .html")
            folder, stem = Folder(parent), name.removesuffix(".html")
            pictures = folder / f"{stem}_files"
        if folder.local is not None:
            make_writable(folder.local, "report", "name a file elsewhere by --html FILE")
        return cls(folder, stem, pictures)

    def write(self, page: str, tables: Sequence[Table], sentences: Sequence[str], records: Sequence[Record]) -> str:
        """Returns where the page is."""
        self.folder.write_text(f"{self.stem}.md", as_markdown(tables, sentences))
        self.folder.write_text(f"{self.stem}.csv", as_csv(records))
        self.folder.write_text(f"{self.stem}.html", page)
        return str(self.folder / f"{self.stem}.html")


def write_page(place: str) -> str:
    """The page of a run that has just ended, from what is in its folder; its pictures too, where the seconds that they
    take are nothing to what it took. Returns where the page is.
    """
    run = load(place)
    to = Place.of(None, Folder(place) / "report")
    if sum(row.get("epoch_s") or 0 for row in run.rows) > DRAWN_AFTER_S:
        _draw(run.name, epoch_panels(run), to.pictures)
        _draw_classes(run, to.pictures)
    return _write_run(run, to)


def write_run(place: str, told: Printed, file: str | None = None, recipe: str | None = None) -> Reported:
    """Report one run."""
    run = load(place, recipe, told.say)
    to = Place.of(file, Folder(place) / "report")
    groups = grouped([run])
    tables = [compared.table(groups), *filter(None, [compared.class_table(groups)])]
    told.tables(tables, compared.records(groups))
    told.say(f"curves: {_draw(run.name, epoch_panels(run), to.pictures)}")
    _draw_classes(run, to.pictures)
    told.say(f"page: {_write_run(run, to)}")
    _log(run, told)
    return run


def write_runs(places: Sequence[str], told: Printed, file: str | None = None, recipe: str | None = None) -> None:
    """Report several runs beside each other; each on a page of its own too, where the page's place is not given."""
    runs = [load(place, recipe, told.say if file is None else None) for place in places]
    to = Place.of(file, _beside(places))
    own = [Place.of(None, Folder(place) / "report") for place in places] if file is None else []
    groups = grouped(runs)
    found = compared.difference_table(compared.differences(groups))
    tables = [compared.table(groups), *filter(None, [compared.class_table(groups), found])]
    sentences = compared.sentences(groups) if len(groups) > 1 else []
    told.tables(tables, compared.records(groups), sentences)
    for run, of_run in zip(runs, own, strict=False):
        told.say(f"curves: {_draw(run.name, epoch_panels(run), of_run.pictures)}")
        _draw_classes(run, of_run.pictures)
        _write_run(run, of_run)
        _log(run, told)
    _draw(f"{len(runs)} runs", overlaid(groups), to.pictures)
    page = runs_page(groups, str(to.folder), to.stem)
    told.say(f"page: {to.write(page, tables, sentences, compared.records(groups))}")


def write_sweep(folder: SweepFolder, told: Printed, file: str | None = None) -> Ranked | None:
    """Report a sweep. Returns the best point; None where none has a figure yet."""
    from dlops_dist import draw

    ranked = folder.ranking()
    ranking = ranking_table(folder, ranked)
    if not ranked or ranked[0].mean is None:
        told.tables([ranking], sweep_records(folder, ranked))
        return None
    tables = [ranking, importance_table(folder.sweep, ranked)]
    told.tables(tables, sweep_records(folder, ranked))
    to = Place.of(file, Folder(folder.path) / "report")
    with to.pictures.as_path() as path:
        drawn = draw.sweep(path, folder.sweep.parameters, folder.sweep.choose_by, ranked)
        pictures = {of.stem: of.read_bytes() for of in drawn}
    for of in drawn:
        told.say(f"drawn: {to.pictures / of.name}")
    page = sweep_page(folder, ranked, pictures, to.stem)
    told.say(f"page: {to.write(page, tables, [], sweep_records(folder, ranked))}")
    return ranked[0]


def _write_run(run: Reported, to: Place) -> str:
    groups = grouped([run])
    return to.write(run_page(run, to.stem), [compared.table(groups)], compared.told_of(run), compared.records(groups))


def _draw(title: str, panels: Sequence[Panel], pictures: Folder) -> str:
    from dlops_dist import draw

    with pictures.as_path() as path:
        draw.curves(path / "curves.png", title, panels)
    return str(pictures / "curves.png")


def _draw_classes(run: Reported, pictures: Folder) -> None:
    """Bars and the confusion matrix, where it is known what the test images were taken for."""
    from dlops_dist import draw

    counts = confusion_of(run.gallery)
    if counts is None:
        return
    classes, by_class = run.gallery.names, run.result.get("test/top1_by_class")  # type: ignore[union-attr]
    with pictures.as_path() as path:
        draw.confusion(path / "confusion.png", counts, classes)
        if by_class:
            draw.class_accuracies(path / "classes.png", by_class, classes)


def _log(run: Reported, told: Printed) -> None:
    """Where it was logged at W&B; a sweep sends its runs' pictures itself."""
    from dlops_dist.sweep.folder import is_sweep

    path = Folder(run.place).local
    if path is not None and not is_sweep(path.absolute().parent):
        log_report(path, run.settings, told.warn)


def _beside(places: Sequence[str]) -> Folder:
    """A folder beside the runs; where they do not lie together, here."""
    parents = {
        place.rstrip("/").rpartition("/")[0] if is_url(place) else str(Path(place).absolute().parent)
        for place in places
    }
    return Folder(parents.pop() if len(parents) == 1 else ".") / "report"
