"""The page of one run: what it was, how it went, what its result makes of the test images."""

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from dlops_dist.config import flat
from dlops_dist.engine.gallery import EXAMPLES, Gallery
from dlops_dist.figures import TITLES, Panel, figure, own_figures
from dlops_dist.report import charts
from dlops_dist.report.compared import BESIDE, class_names, class_table, told_of
from dlops_dist.report.page import Section, facts, page, tables_beside, told
from dlops_dist.report.panels import distance_panel, epoch_panels, step_panels, training_s
from dlops_dist.report.runs import Reported, confusion_of, grouped
from dlops_dist.tables import Table, html

CAPTIONS = {
    "filters": "Weights of the first layer's units, each stretched from black to white",
    "reconstructions": "Test images, and below them what is left of them at each depth",
    "samples": "Training images, a row for each class",
    "classes": "Test top-1 of each class",
    "confusion": "Test images of a class (row) that were taken for which (column)",
    "curves": "Curves by epoch",
}
DRAWN_ANEW = ("samples", "classes", "confusion", "curves")
"""Pictures whose content the page has in another form."""
SHOWN_CLASSES = 24
"""Of more, the best and worst halves of as many are shown."""


def run_page(run: Reported, stem: str) -> str:
    """The whole page, of that name."""
    lead = told(told_of(run)) + facts(_overview(run)) + tables_beside(stem)
    return page(run.name, lead, [Section("Result", html(result_table(run))), *sections(run)])


def sections(run: Reported) -> list[Section]:
    gallery = run.gallery
    if isinstance(gallery, Gallery):
        seen = [
            Section("What is taken for what", _confusion(gallery)),
            Section("Map of the embeddings", _map(run, gallery)),
            Section("Nearest neighbours", _neighbours(gallery)),
        ]
        samples = Section("Samples", _samples(gallery))
    else:
        seen = [Section("Test images", f"<p class=soft>No test images are shown: {escape(gallery)}.</p>")]
        samples = Section("Samples", "")
    return [
        Section("By epoch", _charts(epoch_panels(run))),
        Section("By step", _charts(step_panels(run))),
        Section("Classes", _classes(run)),
        *seen,
        Section("Pictures", _pictures(run)),
        samples,
        Section("Settings", _settings(run)),
    ]


def _charts(panels: Sequence[Panel]) -> str:
    return charts.grid(map(charts.chart, panels)) if panels else ""


def _overview(run: Reported) -> list[tuple[str, object]]:
    known, settings, last = run.facts, run.settings, run.rows[-1]
    found: list[tuple[str, object]] = [("trained", " ".join(filter(None, (run.values.get("task"), settings.variant))))]
    if known:
        numbers = [f"{known[split]:,} {split}" for split in ("train", "val", "test") if known.get(split)]
        found.append(("data", f"{known['dataset']}: {known['classes']:,} classes, {', '.join(numbers)} images"))
    else:
        found.append(("data", settings.data.shards))
    if "parameters" in known:
        found.append(("model", f"{known['parameters'] / 1e6:.2f} M parameters"))
        found.append(("on", f"{known['workers']} worker{'s' * (known['workers'] > 1)}, {known['device']}"))
        found.append(("exactness", known["exactness"]))
    found.append(("length", f"{last['epoch']} epochs, {last['step']:,} steps of {settings.global_batch_size} samples"))
    seconds = sum(row.get("epoch_s") or 0 for row in run.rows)
    if seconds:
        training = sum(training_s(run))
        part = f", of which training {min(1, training / seconds):.0%}" if training else ""
        found.append(("time", f"{duration(seconds)}{part}; the rest is evaluation and checkpoints"))
    return [*found, ("seed", settings.seed), ("folder", run.place)]


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def result_table(run: Reported) -> Table:
    row = run.result
    splits = [split for split in ("train", "val", "test") if any(name.startswith(f"{split}/") for name in row)]
    own = dict.fromkeys(name for split in splits for name in own_figures(row, split))
    names = [name for name in (*TITLES, *own) if any(f"{split}/{name}" in row for split in splits)]
    columns, of_study = ["figure", *splits], run.published[1] if run.published else {}
    rows = [[TITLES.get(name, name), *(figure(row, f"{split}/{name}") for split in splits)] for name in names]
    if of_study:
        columns += [f"{split}: {BESIDE}" for split in ("train", "test")]
        for cells, name in zip(rows, names, strict=True):
            cells += [figure(of_study, f"{split}/{name}") for split in ("train", "test")]
    return Table(f"epoch {row['epoch']}", columns, rows)


def _classes(run: Reported) -> str:
    by_class = run.result.get("test/top1_by_class") or ()
    if not by_class:
        return ""
    names = class_names(run, len(by_class))
    ranked = sorted(((value, place) for place, value in enumerate(by_class) if value is not None), key=_best_first)
    shown = [(names[place], value) for value, place in ranked]
    caption = "Test top-1 of each class, best first"
    missing = f", {len(by_class) - len(ranked)} without test images" if len(ranked) < len(by_class) else ""
    study = class_table(grouped([run])) if run.by_class else None
    beside = html(study) if study else ""
    if len(shown) <= SHOWN_CLASSES:
        return charts.bars(f"{caption}{missing}", shown) + beside
    half = SHOWN_CLASSES // 2
    best = charts.bars(f"The {half} best of {len(shown)} classes, test top-1{missing}", shown[:half])
    worst = charts.bars(f"The {half} worst", shown[-half:])
    every = Table("", ["class", "test top-1"], [[name, f"{value:.1%}"] for name, value in shown])
    return f"{charts.grid([best, worst])}<details><summary>all classes</summary>{html(every)}</details>"


def _best_first(judged: tuple[float, int]) -> tuple[float, int]:
    return -judged[0], judged[1]


def _looked_at(gallery: Gallery) -> str:
    number, whole = len(gallery.labels), gallery.facts.get("test", 0)
    return f"all {number:,} test images" if number == whole else f"{number:,} of {whole:,} test images, evenly taken"


def _confusion(gallery: Gallery) -> str:
    if (gallery.predicted < 0).all():
        return ""
    rows, counts = [], confusion_of(gallery)
    for (label, prediction), images in gallery.confused():
        of = int((gallery.labels == label).sum())
        heading = f"{gallery.names[label]} taken for {gallery.names[prediction]}: {len(images)} of {of}"
        shots = "".join(_shot(gallery, image, f"image {image + 1}") for image in images[:EXAMPLES])
        rows.append(f"<div><p>{escape(heading)}</p>{shots}</div>")
    pairs = f"<h3>Most often confused</h3><div class=rows>{''.join(rows)}</div>" if rows else ""
    drawing = "" if counts is None else charts.matrix(counts, gallery.names)
    return f"<p class=soft>Of {_looked_at(gallery)}.</p>{drawing}{pairs}"


def _shot(gallery: Gallery, image: int, caption: str, kind: str = "") -> str:
    content = gallery.picture(image)
    if content is None:
        return ""
    text = escape(caption)
    return f"<figure class='shot {kind}'><img alt='{text}' src='{charts.image_data(content)}'>{text}</figure>"


def _map(run: Reported, gallery: Gallery) -> str:
    labels = gallery.labels[gallery.mapped]
    if len(labels) < 3:
        return ""
    by_class = run.result.get("test/top1_by_class") or ()
    there = [int(label) for label in np.unique(labels)]
    which = "each class a colour"
    if len(there) > charts.COLOURS:
        ranked = sorted(there, key=lambda c: -((by_class[c] if c < len(by_class) else None) or 0))
        there = [*ranked[: charts.COLOURS // 2], *ranked[-charts.COLOURS // 2 :]]
        which = "in colour the classes that are told best and worst" if by_class else "some classes in colour"
    kinds = [(gallery.names[label], np.flatnonzero(labels == label)) for label in there]
    others = np.flatnonzero(~np.isin(labels, there))
    parts = " and ".join(f"{part:.0%}" for part in gallery.explained.tolist())
    caption = f"{len(labels):,} test images along the two main directions of their embeddings ({which})"
    said = (
        f"The two directions (PCA) hold {parts} of the variance: classes that overlap here may well lie apart in the "
        "others, which the map leaves out."
    )
    drawings = [charts.scatter(caption, gallery.places, kinds, others), charts.chart(distance_panel(gallery))]
    return charts.grid(drawings) + told([said])


def _neighbours(gallery: Gallery) -> str:
    rows = []
    for image, *nearest in gallery.neighbours.tolist():
        label = gallery.labels[image]
        shots = [_shot(gallery, image, gallery.names[label], "asked")]
        for other in nearest:
            same = gallery.labels[other] == label
            shots.append(_shot(gallery, other, gallery.names[gallery.labels[other]], "right" if same else "wrong"))
        rows.append(f"<div>{''.join(shots)}</div>")
    said = (
        f"A test image, and those of {_looked_at(gallery)} whose embeddings are nearest to its own, the nearest "
        "first: framed in green where the class is the same, in orange where it is another."
    )
    return f"<p class=soft>{escape(said)}</p><div class=rows>{''.join(rows)}</div>"


def _samples(gallery: Gallery) -> str:
    rows = []
    for label, jpegs in gallery.samples():
        name = escape(gallery.names[label])
        shots = "".join(
            f"<figure class=shot><img alt='{name}' src='{charts.image_data(jpeg)}'></figure>" for jpeg in jpegs
        )
        rows.append(f"<div><p>{name}</p>{shots}</div>")
    shown, whole = len(rows), len(gallery.classes)
    which = "each class" if shown == whole else f"{shown} of {whole:,} classes"
    return f"<p class=soft>The first training images of {which}.</p><div class=rows>{''.join(rows)}</div>"


def _pictures(run: Reported) -> str:
    left_out = DRAWN_ANEW if isinstance(run.gallery, Gallery) else ("curves",)
    shown = {name: content for name, content in run.pictures.items() if name not in left_out}
    return "".join(charts.picture(name, CAPTIONS.get(name, name), content) for name, content in shown.items())


def _settings(run: Reported) -> str:
    """Those that are not the default, then all."""
    usual = flat(type(run.settings).model_construct().model_dump())
    listed = {n: v for n, v in run.values.items() if n != "task"}
    changed = {n: v for n, v in listed.items() if n not in usual or _word(v) != _word(usual[n])}
    tables = [
        Table("", ["setting", "value"], [[n, _word(v)] for n, v in of.items()], named=2) for of in (changed, listed)
    ]
    return f"{html(tables[0])}<details><summary>all {len(listed)} settings</summary>{html(tables[1])}</details>"


def _word(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
