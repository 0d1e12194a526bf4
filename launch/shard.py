"""Pack datasets into WebDataset shards.

python launch/shard.py                                   both datasets of the study, fetched where needed
python launch/shard.py tiny-imagenet --source FILE.zip   from an archive or folder at hand
python launch/shard.py shapes                            generated images: no network needed
python launch/shard.py folder --source DIR --size 64     any tree with a folder for each class
python launch/shard.py index DIR                         WebDataset shards at hand, left as they are
python launch/shard.py verify shards/tiny-imagenet       is every byte as it was packed?
python launch/shard.py show shards/tiny-imagenet         classes, counts, sizes, and a picture of samples
"""

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from dlops_dist.errors import OneLineParser, RunError, UserError, exit_code_of

if TYPE_CHECKING:
    from dlops_dist.data.shards import Packing
    from dlops_dist.data.sources import Source

STUDY = ("tiny-imagenet", "stl10")
WITH_SOURCE = (*STUDY, "folder")
DATASETS = (*STUDY, "folder", "shapes", "shapes-stl10")
MAX_SIZE = 8192
GENERATED = {"train_per_class": 200, "test_per_class": 40}


def main() -> None:
    command = {"verify": verify, "show": show, "index": index}.get("".join(sys.argv[1:2]), pack_all)
    command()


def verify() -> None:
    """Hash every file again."""
    folder = parse_folder("verify", "Hash every file of packed shards again: is each byte as it was packed?")
    from dlops_dist.data.inspection import damages
    from dlops_dist.data.shards import read_manifest

    manifest = read_manifest(folder)
    found = damages(folder, manifest, progress(f"reading {folder}", "bytes"))
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise RunError(f"{folder}: {', '.join(found[:3])}{more}; {manifest.way_out}")
    print(f"{folder}: {len(manifest.shards)} shards, every byte as it was packed; dataset id {manifest.id[:12]}")


def show() -> None:
    """Print what a folder holds; write a picture beside it."""
    folder = parse_folder(
        "show", "Print classes, counts and sizes of packed shards; write FOLDER-samples.png beside it."
    )
    from dlops_dist import draw
    from dlops_dist.data.inspection import counts_by_class
    from dlops_dist.data.shards import read_manifest

    manifest = read_manifest(folder)
    counts = counts_by_class(folder, manifest)
    width = max(map(len, manifest.classes))
    print(f"{'class':{width}} " + " ".join(f"{split:>9}" for split in counts))
    for label, name in enumerate(manifest.classes):
        print(f"{name:{width}} " + " ".join(f"{numbers[label]:9,}" for numbers in counts.values()))
    picture = folder.absolute().parent / f"{folder.absolute().name}-samples.png"
    draw.samples(picture, folder, manifest)
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    print(
        f"{folder}: {describe(manifest.splits)} of {manifest.height}x{manifest.width}, {manifest.extension}, "
        f"{len(manifest.shards)} shards, {size:.1f} MB, id {manifest.id[:12]}; samples in {picture}"
    )


def index() -> None:
    """Make shards that others wrote readable, without changing them."""
    parser = OneLineParser(
        prog="shard.py index",
        description="Write index.parquet and manifest.json beside WebDataset shards, whose bytes stay as they are. "
        "File names must tell the split (train, val or test, unlabeled); samples hold jpg or npy; cls, json or txt.",
    )
    parser.add_argument("folder", type=Path, help="of the .tar files")
    parser.add_argument("--class-names", type=Path, help="file with a class name in each line, in the labels' order")
    parser.add_argument("--workers", type=positive, help="processes (default: one for each core)")
    arguments = parser.parse_args(sys.argv[2:])
    from dlops_dist.config import Run
    from dlops_dist.data.adopt import adopt, read_class_names
    from dlops_dist.data.inspection import doubts

    names = read_class_names(arguments.class_names) if arguments.class_names else None
    folder = arguments.folder
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    manifest = adopt(folder, folder.absolute().name, names, arguments.workers, progress(f"reading {folder}", "shards"))
    print(f"{folder}: {describe(manifest.splits)}, {len(manifest.classes)} classes, {len(manifest.shards)} shards")
    for text in doubts(folder, manifest, Run().global_batch_size):
        print(f"warning: {text}")


def parse_folder(command: str, description: str) -> Path:
    parser = OneLineParser(prog=f"shard.py {command}", description=description)
    parser.add_argument("folder", type=Path, help="of one dataset, such as shards/tiny-imagenet")
    return parser.parse_args(sys.argv[2:]).folder


def pack_all() -> None:
    arguments = parse()
    from dlops_dist.data.pack import packed_before

    if arguments.source and (len(arguments.datasets) != 1 or arguments.datasets[0] not in WITH_SOURCE):
        raise UserError(f"--source goes with exactly one of {', '.join(WITH_SOURCE)}: name it")
    if arguments.test_fraction is not None and arguments.datasets != ["folder"]:
        raise UserError("--test-fraction goes with folder: other datasets have a test split")
    asked_for = {name: getattr(arguments, name) for name in ("seed", "shard_size", "classes", "limit", "size")}
    asked_for |= {n: v for n in ("test_fraction", "skip_bad") if (v := getattr(arguments, n))}
    for dataset in arguments.datasets or STUDY:
        name = folder_name(arguments.source) if dataset == "folder" else dataset
        out = arguments.out / name
        manifest = None if arguments.again else packed_before(out, asked_for)
        if manifest is not None:
            held = f"{describe(manifest.splits)}, {len(manifest.classes)} classes"
            unread = "; --source was not looked at" if arguments.source else ""
            print(f"{out}: already packed, {held}{unread} (--again packs anew)")
            continue
        pack_one(dataset, name, out, arguments, asked_for)


def pack_one(dataset: str, name: str, out: Path, arguments: argparse.Namespace, asked_for: "Packing") -> None:
    from dlops_dist.data.pack import pack
    from dlops_dist.data.sources import ImageFolder, Limited
    from dlops_dist.files import make_writable, temporary_folder

    with tempfile.TemporaryDirectory(dir=temporary_folder()) as scratch:
        source = open_source(dataset, arguments, Path(scratch))
        if isinstance(source, ImageFolder):
            print(source.described, flush=True)
        make_writable(out, "--out", "choose another")
        if arguments.limit is not None:
            source = Limited(source, arguments.limit, arguments.seed)
        started = time.monotonic()
        manifest = pack(
            source, out, name, arguments.seed, arguments.shard_size, arguments.workers,
            progress(f"packing {name}", "images"), asked_for, arguments.again,
            size=arguments.size, skip_bad=arguments.skip_bad, on_note=print,
        )  # fmt: skip
    seconds = time.monotonic() - started
    images = sum(manifest.splits.values())
    print(
        f"{out}: {describe(manifest.splits)}, {len(manifest.classes)} classes, {len(manifest.shards)} shards, "
        f"{sum(s.bytes for s in manifest.shards) / 1e6:.1f} MB in {seconds:.1f} s ({images / seconds:.0f} images/s)"
    )


def folder_name(source: str | None) -> str:
    """Of the packed dataset: that of the folder it comes from."""
    if source is None:
        raise UserError("folder needs --source: the root of a tree with a folder for each class")
    name = Path(source).resolve().name
    if not name:
        raise UserError(f"--source {source}: the root of the file system is no dataset")
    return name


def parse() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "datasets", nargs="*", metavar="DATASET", help=f"{', '.join(DATASETS)}; default: {' '.join(STUDY)}"
    )
    parser.add_argument("--source", help="archive, folder or URL to read (default: the official archive)")
    parser.add_argument("--out", type=Path, default=Path("shards"), help="folder of all datasets (default: shards)")
    parser.add_argument(
        "--downloads", type=Path, default=Path("downloads"), help="where archives are kept (default: downloads)"
    )
    parser.add_argument("--classes", type=positive, help="only the first so many classes, by sorted name")
    parser.add_argument("--limit", type=positive, help="at most so many images of each split, evenly over the classes")
    parser.add_argument("--size", type=size, help="scale and crop images to so many pixels square, where they differ")
    parser.add_argument(
        "--test-fraction", type=fraction, help="part of each class to test on where a folder has no test (default: 0.1)"
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out images that cannot be read; they are listed, in the manifest too",
    )
    parser.add_argument("--shard-size", type=positive, default=5000, help="samples in a shard (default: 5000)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the order in the shards (default: 0)")
    parser.add_argument("--workers", type=positive, help="packing processes (default: one for each core)")
    parser.add_argument("--again", action="store_true", help="pack anew what is already packed")
    arguments = parser.parse_args()
    for dataset in arguments.datasets:
        if dataset not in DATASETS:
            parser.error(f"unknown dataset {dataset!r}: choose from {', '.join(DATASETS)}")
    return arguments


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{value} must be from 0 to 2^32 - 1")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be above 0 and below 1")
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def size(text: str) -> int:
    value = positive(text)
    if value > MAX_SIZE:
        raise argparse.ArgumentTypeError(f"{value} must be at most {MAX_SIZE}")
    return value


def open_source(dataset: str, arguments: argparse.Namespace, scratch: Path) -> "Source":
    """The named source, or the official archive, or generated images."""
    from dlops_dist.data import shapes
    from dlops_dist.data.fetch import OFFICIAL, Archive, fetch
    from dlops_dist.data.sources import STL10, ImageFolder, TinyImageNet, unpack_stl10

    if dataset == "shapes":
        shapes.write_tiny_imagenet(scratch / "shapes.zip", **GENERATED)
        return TinyImageNet(scratch / "shapes.zip", arguments.classes)
    if dataset == "shapes-stl10":
        shapes.write_stl10(scratch / "stl10_binary", num_unlabeled=1000, **GENERATED)
        return STL10(scratch, arguments.classes)
    if arguments.source is None:
        path = fetch(OFFICIAL[dataset], arguments.downloads, progress(f"fetching {dataset}", "bytes"))
    elif arguments.source.startswith("pipe:"):
        raise UserError(f"--source {arguments.source}: nothing is run; name a file, a folder or a URL")
    elif "://" in arguments.source:
        where = hashlib.sha256(arguments.source.encode()).hexdigest()[:8]
        try:
            name = Path(urlparse(arguments.source).path).name
        except ValueError as error:
            raise UserError(f"--source {arguments.source} is no URL ({error})") from None
        archive = Archive(arguments.source, f"{where}-{name}", md5="")
        path = fetch(archive, arguments.downloads, progress(f"fetching {dataset}", "bytes"))
    else:
        path = Path(arguments.source)
        if not path.exists():
            raise UserError(f"--source {path}: no such file or folder")
    if dataset == "folder":
        return ImageFolder(path, arguments.classes, arguments.test_fraction)
    if dataset == "tiny-imagenet":
        return TinyImageNet(path, arguments.classes)
    return STL10(path if path.is_dir() else unpack_stl10(path, path.parent), arguments.classes)


def progress(title: str, unit: str) -> Callable[[int, int], None]:
    """A line that is rewritten on a terminal, and repeated every ten seconds elsewhere."""
    started, shown = time.monotonic(), 0.0

    def show(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < (0.1 if sys.stderr.isatty() else 10) and done < total:
            return
        shown = now
        rate = done / max(now - started, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if total and rate else ""
        end = "\r" if sys.stderr.isatty() and done < total else "\n"
        print(f"{title}: {done:,} of {total:,} {unit}, {rate:,.0f}/s{left}\033[K" if sys.stderr.isatty() else
              f"{title}: {done:,} of {total:,} {unit}, {rate:,.0f}/s{left}", end=end, file=sys.stderr)  # fmt: skip

    return show


def describe(splits: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {split}" for split, number in splits.items())


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
