"""Pack datasets into WebDataset shards: what `python -m dlops_dist.shard --help` says."""

import hashlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlparse

from pydantic import Field

from dlops_dist.command_line import read_options
from dlops_dist.config.section import LocalPath, Section
from dlops_dist.errors import RunError, UserError, exit_code_of

if TYPE_CHECKING:
    from dlops_dist.data.shards import Manifest, Packing
    from dlops_dist.data.sources import Source

STUDY = ("tiny-imagenet", "stl10")
Dataset = Literal["tiny-imagenet", "stl10", "folder", "shapes", "shapes-stl10"]
WITH_SOURCE = (*STUDY, "folder")
GENERATED = {"train_per_class": 200, "test_per_class": 40}


class Pack(Section):
    """Pack datasets into WebDataset shards.

    $ python -m dlops_dist.shard                                   both datasets of the study, fetched where needed
    $ python -m dlops_dist.shard tiny-imagenet --source FILE.zip   from an archive or folder at hand
    $ python -m dlops_dist.shard shapes                            generated images: no network needed
    $ python -m dlops_dist.shard folder --source DIR --size 64     any tree with a folder for each class
    $ python -m dlops_dist.shard index DIR                         WebDataset shards at hand, left as they are
    $ python -m dlops_dist.shard verify shards/tiny-imagenet       is every byte as it was packed?
    $ python -m dlops_dist.shard show shards/tiny-imagenet         classes, counts, sizes, and a picture of samples
    """

    positional = "datasets"
    datasets: tuple[Dataset, ...] = ()
    """What to pack; by default tiny-imagenet and stl10."""
    source: str | None = None
    """Archive, folder or URL to read; by default the official archive."""
    out: LocalPath = Path("shards")
    """Folder of all datasets."""
    downloads: LocalPath = Path("downloads")
    """Where archives are kept."""
    classes: int | None = Field(None, ge=1)
    """Only the first so many classes, by sorted name."""
    limit: int | None = Field(None, ge=1)
    """At most so many images of each split, evenly over the classes."""
    size: int | None = Field(None, ge=1, le=8192)
    """Scale and crop images to so many pixels square, where they differ."""
    test_fraction: float | None = Field(None, gt=0, lt=1)
    """Part of each class to test on where a folder has no test; by default 0.1."""
    skip_bad: bool = False
    """Leave out images that cannot be read; they are listed, in the manifest too."""
    shard_size: int = Field(5000, ge=1)
    """Samples in a shard."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the order in the shards."""
    workers: int | None = Field(None, ge=1)
    """Packing processes; by default one for each core."""
    again: bool = False
    """Pack anew what is already packed."""


class Verify(Section):
    """Hash every file of packed shards again: is each byte as it was packed?"""

    positional = "folder"
    folder: LocalPath
    """Of one dataset, such as shards/tiny-imagenet."""


class Show(Section):
    """Print classes, counts and sizes of packed shards; write FOLDER-samples.png beside it."""

    positional = "folder"
    folder: LocalPath
    """Of one dataset, such as shards/tiny-imagenet."""


class Index(Section):
    """Write index.parquet and manifest.json beside WebDataset shards, whose bytes stay as they are.

    File names must tell the split (train, val or test, unlabeled); samples hold jpg or npy; cls, json or txt.
    """

    positional = "folder"
    folder: LocalPath
    """Of the .tar files."""
    class_names: LocalPath | None = None
    """File with a class name in each line, in the labels' order."""
    workers: int | None = Field(None, ge=1)
    """Processes; by default one for each core."""


def main() -> None:
    """The first argument may be a command; without one, datasets are packed."""
    match sys.argv[1:]:
        case ["verify", *arguments]:
            verify(read_options(Verify, arguments, "python -m dlops_dist.shard verify"))
        case ["show", *arguments]:
            show(read_options(Show, arguments, "python -m dlops_dist.shard show"))
        case ["index", *arguments]:
            index(read_options(Index, arguments, "python -m dlops_dist.shard index"))
        case arguments:
            pack_all(read_options(Pack, arguments, "python -m dlops_dist.shard"))


def verify(settings: Verify) -> None:
    from dlops_dist.data.inspection import damages
    from dlops_dist.data.shards import read_manifest

    folder = settings.folder
    manifest = read_manifest(folder)
    found = damages(folder, manifest, progress(f"reading {folder}", "bytes"))
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise RunError(f"{folder}: {', '.join(found[:3])}{more}; {manifest.way_out}")
    print(f"{folder}: {len(manifest.shards)} shards, every byte as it was packed; dataset id {manifest.id[:12]}")


def show(settings: Show) -> None:
    from dlops_dist import draw
    from dlops_dist.data.inspection import counts_by_class
    from dlops_dist.data.shards import read_manifest

    folder = settings.folder
    manifest = read_manifest(folder)
    counts = counts_by_class(folder, manifest)
    width = max(map(len, manifest.classes))
    print(f"{'class':{width}} " + " ".join(f"{split:>9}" for split in counts))
    for label, name in enumerate(manifest.classes):
        print(f"{name:{width}} " + " ".join(f"{numbers[label]:9,}" for numbers in counts.values()))
    picture = folder.absolute().parent / f"{folder.absolute().name}-samples.png"
    draw.samples(picture, folder, manifest)
    kind = f"{manifest.height}x{manifest.width} {manifest.extension}"
    print(f"{folder}: {describe(manifest)} of {kind}, id {manifest.id[:12]}; samples in {picture}")


def index(settings: Index) -> None:
    from dlops_dist.config import Run
    from dlops_dist.data.adopt import adopt, read_class_names
    from dlops_dist.data.inspection import counts_by_class, doubts, is_open_set

    folder = settings.folder
    names = read_class_names(settings.class_names) if settings.class_names else None
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    manifest = adopt(folder, folder.absolute().name, names, settings.workers, progress(f"reading {folder}", "shards"))
    print(f"{folder}: {describe(manifest)}")
    counts = counts_by_class(folder, manifest)
    if is_open_set(counts):
        print(f"an open set: {(counts['test'] > 0).sum()} classes to test on, none of which has a training sample")
    for text in doubts(counts, manifest.classes, Run().global_batch_size):
        print(f"warning: {text}")


def pack_all(settings: Pack) -> None:
    from dlops_dist.data.pack import clear_complete, packed_before

    if settings.source and (len(settings.datasets) != 1 or settings.datasets[0] not in WITH_SOURCE):
        raise UserError(f"--source goes with exactly one of {', '.join(WITH_SOURCE)}: name it")
    if settings.test_fraction is not None and settings.datasets != ("folder",):
        raise UserError("--test-fraction goes with folder: other datasets have a test split")
    asked_for = {name: getattr(settings, name) for name in ("seed", "shard_size", "classes", "limit", "size")}
    asked_for |= {n: v for n in ("test_fraction", "skip_bad") if (v := getattr(settings, n))}
    for dataset in settings.datasets or STUDY:
        name = folder_name(settings.source) if dataset == "folder" else dataset
        out = settings.out / name
        manifest = None if settings.again else packed_before(out, asked_for)
        if manifest is not None:
            clear_complete(out)
            unread = "; --source was not looked at" if settings.source else ""
            print(f"{out}: already packed, {describe(manifest)}{unread} (--again packs anew)")
            continue
        pack_one(dataset, name, out, settings, asked_for)


def pack_one(dataset: str, name: str, out: Path, settings: Pack, asked_for: "Packing") -> None:
    from dlops_dist.data.pack import pack
    from dlops_dist.data.sources import ImageFolder
    from dlops_dist.files import make_writable, temporary_folder

    with tempfile.TemporaryDirectory(dir=temporary_folder()) as scratch:
        source = open_source(dataset, settings, Path(scratch))
        if isinstance(source, ImageFolder):
            print(source.described, flush=True)
        make_writable(out, "--out", "choose another")
        started = time.monotonic()
        manifest = pack(
            source, out, name, settings.seed, settings.shard_size, settings.workers,
            progress(f"packing {name}", "images"), asked_for, settings.again,
            size=settings.size, limit=settings.limit, skip_bad=settings.skip_bad, on_note=print,
        )  # fmt: skip
    seconds = time.monotonic() - started
    rate = sum(manifest.splits.values()) / seconds
    print(f"{out}: {describe(manifest)} in {seconds:.1f} s ({rate:.0f} images/s)")


def folder_name(source: str | None) -> str:
    """Of the packed dataset: that of the folder it comes from."""
    if source is None:
        raise UserError("folder needs --source: the root of a tree with a folder for each class")
    name = Path(source).resolve().name
    if not name:
        raise UserError(f"--source {source}: the root of the file system is no dataset")
    return name


def open_source(dataset: str, settings: Pack, scratch: Path) -> "Source":
    """The named source, or the official archive, or generated images."""
    from dlops_dist.data import shapes
    from dlops_dist.data.sources import STL10, ImageFolder, TinyImageNet, unpack_stl10
    from dlops_dist.data.sources.fetch import OFFICIAL, Archive, fetch

    if dataset == "shapes":
        shapes.write_tiny_imagenet(scratch / "shapes.zip", **GENERATED)
        return TinyImageNet(scratch / "shapes.zip", settings.classes)
    if dataset == "shapes-stl10":
        shapes.write_stl10(scratch / "stl10_binary", num_unlabeled=1000, **GENERATED)
        return STL10(scratch, settings.classes)
    if settings.source is None:
        path = fetch(OFFICIAL[dataset], settings.downloads, progress(f"fetching {dataset}", "bytes"))
    elif settings.source.startswith("pipe:"):
        raise UserError(f"--source {settings.source}: nothing is run; name a file, a folder or a URL")
    elif "://" in settings.source:
        where = hashlib.sha256(settings.source.encode()).hexdigest()[:8]
        try:
            name = Path(urlparse(settings.source).path).name
        except ValueError as error:
            raise UserError(f"--source {settings.source} is no URL ({error})") from None
        archive = Archive(settings.source, f"{where}-{name}", md5="")
        path = fetch(archive, settings.downloads, progress(f"fetching {dataset}", "bytes"))
    else:
        path = Path(settings.source)
        if not path.exists():
            raise UserError(f"--source {path}: no such file or folder")
    if dataset == "folder":
        return ImageFolder(path, settings.classes, settings.test_fraction)
    if dataset == "tiny-imagenet":
        return TinyImageNet(path, settings.classes)
    return STL10(path if path.is_dir() else unpack_stl10(path, path.parent), settings.classes)


def progress(title: str, unit: str) -> Callable[[int, int], None]:
    """A line that is rewritten on a terminal, and repeated every ten seconds elsewhere."""
    started, shown, is_live = time.monotonic(), 0.0, sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < (0.1 if is_live else 10) and done < total:
            return
        shown = now
        rate = done / max(now - started, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if total and rate else ""
        line = f"{title}: {done:,} of {total:,} {unit}, {rate:,.0f}/s{left}" + "\033[K" * is_live
        print(line, end="\r" if is_live and done < total else "\n", file=sys.stderr)

    return show


def describe(manifest: "Manifest") -> str:
    splits = "".join(f"{number:,} {split}, " for split, number in manifest.splits.items())
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    return f"{splits}{len(manifest.classes)} classes, {len(manifest.shards)} shards, {size:.1f} MB"


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
