"""What the result of a run makes of test images, and some of those to look at: a file in the run's report/."""

import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image

from dlops_dist.data.loader import Batch
from dlops_dist.data.order import blocks
from dlops_dist.data.readers import Reader
from dlops_dist.data.shards import read_manifest
from dlops_dist.engine.device import default_device
from dlops_dist.engine.evaluation import BLOCK, judged_alone, read_blocks
from dlops_dist.engine.geometry import neighbours, pair_distances, plane
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.result import result_of
from dlops_dist.engine.rows import best_row
from dlops_dist.engine.run_folder import RunFolder
from dlops_dist.engine.samples import Samples
from dlops_dist.errors import UserError
from dlops_dist.metrics import Judged

FILE, FORMAT = "gallery.npz", 1
MOST, FEWEST = 10_000, 512
TRAINED_FOR_ONE = 20
"""Samples of training for each test image that is looked at once more: two hundredths of the run's time at most, as
training on one takes three times as long."""
MAPPED, PAIRED = 2000, 1000
QUERIES = 8
PAIRS, EXAMPLES = 8, 4
CLASSES, OF_A_CLASS = 10, 6
THUMBNAIL, QUALITY = 96, 90
Pair = tuple[int, int]
"""A class, and the one that its samples were taken for."""


@dataclass(frozen=True)
class Gallery:
    """Test images as a run's result sees them. Numbers of images count those that were looked at, from 0."""

    facts: dict[str, Any]
    """Of the run and its data, by what they are called."""
    classes: tuple[str, ...]
    labels: np.ndarray
    """(n,)"""
    predicted: np.ndarray
    """(n,), -1 where nothing is classified."""
    mapped: np.ndarray
    """(m,) images that are on the map."""
    places: np.ndarray
    """(m, 2) along the two directions in which their embeddings vary most."""
    explained: np.ndarray
    """(2,) the directions' parts of all variance."""
    distances: np.ndarray
    """(b + 1,) ends of ranges of the distance between two embeddings."""
    alike: np.ndarray
    """(2, b) part of the pairs in each range: of two images of one class, of two of different classes."""
    neighbours: np.ndarray
    """(q, 1 + k) an image, and those whose embeddings are nearest to its own, the nearest first."""
    pictured: np.ndarray
    """(p,) images that are kept, each a JPEG."""
    sampled: np.ndarray
    """(s,) classes of some training images, which are kept after those."""
    jpegs: list[bytes] = field(default_factory=list)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The classes, without WordNet's numbers and further words where what is left still tells them apart."""
        short = tuple(re.sub(r"^n\d{8} ", "", name).partition(",")[0] for name in self.classes)
        return short if len(set(short)) == len(short) and all(short) else self.classes

    def picture(self, image: int) -> bytes | None:
        place = np.flatnonzero(self.pictured == image)
        return self.jpegs[place[0]] if len(place) else None

    def samples(self) -> Iterator[tuple[int, list[bytes]]]:
        """Some training images of some classes."""
        jpegs = self.jpegs[len(self.pictured) :]
        for label in dict.fromkeys(self.sampled.tolist()):
            yield label, [jpegs[place] for place in np.flatnonzero(self.sampled == label)]

    def confused(self) -> list[tuple[Pair, list[int]]]:
        """Pairs of classes that were taken for each other most often, and the images of which that is so."""
        return confused(self.labels, self.predicted, len(self.classes))

    def save(self, folder: Path) -> None:
        arrays = {name: value for name, value in asdict(self).items() if isinstance(value, np.ndarray)}
        told = json.dumps({"format": FORMAT, "facts": self.facts, "classes": self.classes})
        pixels = np.frombuffer(b"".join(self.jpegs), np.uint8)
        with (folder / FILE).open("wb") as file:
            sizes = [len(jpeg) for jpeg in self.jpegs]
            np.savez(file, told=np.array(told), jpegs=pixels, sizes=sizes, **arrays)  # type: ignore[arg-type]

    @classmethod
    def of(cls, content: bytes) -> "Gallery":
        """Raises ValueError: it is damaged, or of another version."""
        try:
            with np.load(io.BytesIO(content)) as file:
                arrays = dict(file)
            told = json.loads(str(arrays.pop("told")))
            if told.pop("format") != FORMAT:
                raise ValueError("another version wrote it")
            pixels, ends = arrays.pop("jpegs").tobytes(), np.cumsum(arrays.pop("sizes")).tolist()
            jpegs = [pixels[start:end] for start, end in zip([0, *ends], ends, strict=False)]
            return cls(told["facts"], tuple(told["classes"]), jpegs=jpegs, **arrays)
        except (ValueError, KeyError, TypeError, OSError, EOFError, BadZipFile) as error:
            raise ValueError(f"{FILE}: {error}") from None


@contextmanager
def told_only(warn: Callable[[str], None]) -> Iterator[None]:
    """A file of pictures that cannot be written fails no run that is trained."""
    try:
        yield
    except OSError as error:
        warn(f"report: {error}; the run itself is whole")


def keep(
    folder: RunFolder, learner: Learner, samples: Samples, rows: Sequence[dict[str, Any]], facts: dict[str, Any],
    warn: Callable[[str], None],
) -> None:  # fmt: skip
    """Keep a gallery of the run that a learner has just trained, whose result may be an earlier epoch's."""
    settings = learner.settings
    best = best_row(rows, settings.choose_by)
    if best is not None and best["step"] != rows[-1]["step"]:
        learner.load_state_dict(folder.result(learner.device, warn))
    gallery = look(learner, samples, rows[-1]["step"] * settings.global_batch_size, facts | facts_of(samples))
    with told_only(warn), (folder.folder / "report").as_path() as report:
        gallery.save(report)


def look(learner: Learner, samples: Samples, trained: int, facts: dict[str, Any]) -> Gallery:
    """At test images evenly over the split; at all of it, where that takes little of the run's time.

    Args:
        trained: how many samples the run has trained on, each counted as often as it was.
    """
    test, classes = samples.test, samples.manifest.classes
    ids = _evenly(len(test), max(FEWEST, trained // TRAINED_FOR_ONE), MOST)
    judged = _judged(learner, test, ids)
    x, labels = torch.cat([j.embeddings for j in judged]).float().cpu(), test.labels[ids]
    predicted = torch.cat([j.logits for j in judged]).argmax(dim=1).cpu().numpy()
    seen = ~learner.class_means.isnan().any(dim=1).cpu().numpy()
    if not seen[labels].any():  # an open set
        predicted = np.full_like(labels, -1)
    mapped = _evenly(len(ids), MAPPED)
    places, explained = plane(x[mapped])
    some = _evenly(len(ids), PAIRED)
    distances, alike = pair_distances(x[some], labels[some])
    near = neighbours(x, _evenly(len(ids), QUERIES))
    examples = [image for _, images in confused(labels, predicted, len(classes)) for image in images[:EXAMPLES]]
    pictured = np.unique([*near.flatten().tolist(), *examples]).astype(np.int64)
    train = samples.train
    of_classes = [np.flatnonzero(train.labels == label)[:OF_A_CLASS] for label in _evenly(len(classes), CLASSES)]
    sampled = np.concatenate(of_classes)
    return Gallery(
        facts, tuple(classes), labels, predicted,
        mapped, places, explained, distances, alike, near, pictured, train.labels[sampled],
        [*_jpegs(test, ids[pictured]), *_jpegs(train, sampled)],
    )  # fmt: skip


def look_again(run: str, recipe: str | None) -> Gallery:
    """At the result of a run that is over.

    Raises:
        UserError: there is no checkpoint of it, its shards are not there any more, or its recipe is not known.
    """
    settings, learner, state = result_of(run, default_device(), lambda _: None, recipe, compiles=False)
    shards = Path(settings.data.shards)
    manifest = read_manifest(shards)
    if manifest.id != state["dataset_id"]:
        raise UserError(f"data.shards: {shards} holds other data than {run} was trained on")
    samples = Samples(shards, manifest, settings)
    return look(learner, samples, state["step"] * settings.global_batch_size, facts_of(samples))


def facts_of(samples: Samples) -> dict[str, Any]:
    """What is known of the data."""
    manifest = samples.manifest
    facts = {"dataset": manifest.dataset, "dataset_id": manifest.id, "classes": len(manifest.classes)}
    return facts | {"train": len(samples.ids), "val": len(samples.val_ids), "test": len(samples.test)}


def confused(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> list[tuple[Pair, list[int]]]:
    """The pairs (label, prediction) that are wrong most often, and their images; of equal ones the lower label comes
    first.
    """
    wrong = np.flatnonzero((predicted >= 0) & (predicted != labels))
    pairs = labels[wrong] * num_classes + predicted[wrong]
    kinds, counts = np.unique(pairs, return_counts=True)
    most = np.lexsort((kinds, -counts))[:PAIRS]
    found = [(divmod(int(kind), num_classes), wrong[pairs == kind].tolist()) for kind in kinds[most]]
    return [((label, prediction), images) for (label, prediction), images in found]


@torch.no_grad()
def _judged(learner: Learner, reader: Reader, ids: np.ndarray) -> list[Judged]:
    """As evaluation does it, by this rank alone."""

    def of_block(_: Any, batch: Batch) -> Judged:
        return judged_alone(learner, learner.judged(batch)[0], batch.labels)

    read, found = read_blocks(learner, reader, blocks(ids, BLOCK)), []
    while together := list(islice(read, len(learner.lanes))):
        found += learner.lanes.map(of_block, together)
    return found


def _evenly(number: int, *most: int) -> np.ndarray:
    """So many places at most, evenly from the first to the last."""
    return np.linspace(0, number - 1, min(number, *most)).round().astype(np.int64)


def _jpegs(reader: Reader, ids: np.ndarray) -> list[bytes]:
    """Small ones of images."""
    if not len(ids):
        return []
    return [_jpeg(image) for image in torch.as_tensor(reader.read(ids)).cpu().numpy()]


def _jpeg(pixels: np.ndarray) -> bytes:
    image, content = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(content, "JPEG", quality=QUALITY, subsampling=0)
    return content.getvalue()
