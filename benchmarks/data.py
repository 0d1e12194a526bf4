"""P1 to P4: CPU time from packed shards to training-ready batches, packing, and the order of large datasets.

    python benchmarks/data.py [SHARDS] [--archive FILE.zip] [--images 5120] [--runs 5]

Training-ready: 4-pixel pad and crop, flip, normalise, batches of 128, in one process. Peers read the same images:
stock webdataset with PIL, and torchvision's ImageFolder with DataLoader, both with torchvision's v2 transforms. CPU
time is that of all threads. As in training, the process keeps the memory that it frees, for all sides alike. Without
SHARDS and --archive, 64x64 images are generated. Packing is wall time, on all cores.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision
import webdataset
from timing import medians
from torchvision.transforms import v2

from dlops_dist.config import Augment
from dlops_dist.data.augment import Augmenter, Normalize
from dlops_dist.data.loader import TrainingOrder, read_ahead
from dlops_dist.data.memory import keep_freed_memory
from dlops_dist.data.pack import pack
from dlops_dist.data.readers import open_readers
from dlops_dist.data.shapes import write_tiny_imagenet
from dlops_dist.data.shards import Manifest, Split, read_manifest
from dlops_dist.data.sources import TinyImageNet

BATCH = 128
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, nargs="?")
    parser.add_argument("--archive", type=Path, help="what is packed for P3, in Tiny ImageNet's layout")
    parser.add_argument("--images", type=int, default=40 * BATCH, help="read by each side in each run")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        archive = arguments.archive or generated(Path(folder))
        shards = arguments.shards or Path(folder) / "shards"
        if arguments.shards is None:
            pack(TinyImageNet(archive), shards, "shapes")
        reading(shards, Path(folder), arguments.images, arguments.runs)
        parts(shards, arguments.runs)
        packing(archive, Path(folder), arguments.runs)
    order(arguments.runs)


def generated(folder: Path) -> Path:
    write_tiny_imagenet(folder / "shapes.zip", train_per_class=1000, test_per_class=10)
    return folder / "shapes.zip"


def reading(shards: Path, scratch: Path, number: int, runs: int) -> None:
    """P1 and P2."""
    manifest = read_manifest(shards)
    split = Split(shards, manifest, "train")
    number = min(number, len(split)) // BATCH * BATCH
    sides: dict[str, Callable[[], object]] = {
        "webdataset, PIL": lambda: [None for _ in stock_webdataset(shards, manifest, number)],
        "ImageFolder + DataLoader": image_folder(shards, split, scratch / "tree", manifest, number),
    }
    for kind in ("decode", "decoded"):
        (reader,) = open_readers([split], kind, str(scratch), CPU, print, print).readers
        sides[f"ours, {kind}"] = lambda reader=reader: [None for _ in ours(reader, manifest, number)]  # type: ignore[misc]
    cpu, wall = medians(sides, runs, time.process_time), medians(sides, runs)
    stock = cpu["webdataset, PIL"]
    for name in sides:
        print(
            f"{name:25} {1e6 * cpu[name] / number:6.1f} us of CPU time an image, {number / wall[name]:7,.0f} images/s, "
            f"{stock / cpu[name]:5.1f} x webdataset"
        )
    batches = np.random.default_rng(0).permutation(len(split))[:number].reshape(-1, BATCH)

    def read_all() -> None:
        for ids in batches:
            reader.read(ids)

    read = medians({"read": read_all}, runs, time.process_time)["read"]
    alone = f"{1e6 * read / number:6.1f} us of CPU time an image, {stock / read:5.0f} x webdataset"
    print(f"{'ours, decoded, read alone':25} {alone}")


def ours(reader, manifest: Manifest, number: int) -> Iterator[torch.Tensor]:
    order = np.random.default_rng(0).permutation(len(reader))[:number].reshape(-1, BATCH)
    changed, normalize = (
        Augmenter(Augment(), 0, manifest.mean, CPU),
        Normalize(manifest.mean, manifest.std, torch.float32),
    )
    for batch in read_ahead(reader, ((ids, slice(0, BATCH)) for ids in order), CPU, threads=1, prefetch=2):
        yield normalize(changed(batch.images, batch.ids, 0))


def transform(manifest: Manifest) -> v2.Compose:
    size = (manifest.height, manifest.width)
    crop = v2.RandomCrop(size, padding=4)
    return v2.Compose([
        v2.ToImage(), crop, v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(manifest.mean, manifest.std),
    ])  # fmt: skip


def urls(shards: Path) -> list[str]:
    return sorted(str(path) for path in shards.glob("train-*.tar"))


def stock_webdataset(shards: Path, manifest: Manifest, number: int) -> Iterator[torch.Tensor]:
    change = transform(manifest)
    dataset = webdataset.WebDataset(urls(shards), shardshuffle=False).shuffle(1000).decode("pil").to_tuple("jpg", "cls")
    batches = dataset.map_tuple(change, lambda label: label).batched(BATCH)
    for read, (images, _) in enumerate(batches, 1):
        yield images
        if read * BATCH >= number:
            return


def image_folder(shards: Path, split: Split, tree: Path, manifest: Manifest, number: int) -> Callable[[], object]:
    """The same images, in a folder for each class."""
    samples = webdataset.WebDataset(urls(shards), shardshuffle=False)
    jpegs = [sample["jpg"] for sample in itertools.islice(samples, number)]
    for i in range(number):
        path = tree / str(split.labels[i]) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpegs[i])
    dataset = torchvision.datasets.ImageFolder(str(tree), transform(manifest))
    loader = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True)
    return lambda: [None for _ in loader]


def parts(shards: Path, runs: int) -> None:
    """What the time goes into."""
    manifest = read_manifest(shards)
    split = Split(shards, manifest, "train")
    ids = np.random.default_rng(1).permutation(len(split))[:BATCH]
    images, own = torch.from_numpy(split.read(ids)), torch.from_numpy(ids)
    more = Augment(crop_padding=0, flip=False, resized_crop=0.25)
    jitter = Augment(crop_padding=0, flip=False, brightness=0.4, contrast=0.4, saturation=0.4)
    normalize = Normalize(manifest.mean, manifest.std, torch.float32)
    crop, more, jitter = (Augmenter(chosen, 0, manifest.mean, CPU) for chosen in (Augment(), more, jitter))
    sides: dict[str, Callable[[], object]] = {
        "read and decode": lambda: split.read(ids),
        "crop and flip": lambda: crop(images, own, 0),
        "normalise": lambda: normalize(images),
        "(random resized crop)": lambda: more(images, own, 0),
        "(colour jitter)": lambda: jitter(images, own, 0),
    }
    found = medians(sides, 5 * runs, time.process_time)
    print("of it: " + ", ".join(f"{name} {1e6 * seconds / BATCH:.1f} us" for name, seconds in found.items()))


def packing(archive: Path, scratch: Path, runs: int) -> None:
    """P3: the command, its start included, all images verified, against one loop of webdataset's ShardWriter."""
    source = TinyImageNet(archive)
    number = sum(len(listing.keys) for listing in source.splits.values())

    def we() -> None:
        command = [sys.executable, "-m", "dlops_dist.shard", "tiny-imagenet", "--again"]
        subprocess.run([*command, "--source", str(archive), "--out", str(scratch)], check=True, capture_output=True)

    def they() -> None:
        for split, listing in source.splits.items():
            (scratch / split).mkdir(exist_ok=True)
            pattern = str(scratch / split / "%06d.tar")
            with webdataset.ShardWriter(pattern, maxcount=5000, verbose=0) as sink:
                for i, (key, label) in enumerate(zip(listing.keys, listing.labels.tolist(), strict=True)):
                    sink.write({"__key__": key, "jpg": source.read(split, i), "cls": label})

    found = medians({"ours": we, "ShardWriter": they}, runs)
    ours_us, theirs_us = (1e6 * found[name] / number for name in ("ours", "ShardWriter"))
    print(
        f"P3 packing {number:,} images: ours {ours_us:.0f} us an image, verified; ShardWriter {theirs_us:.0f} us, "
        f"not verified; "
        f"{theirs_us / ours_us:.2f} x"
    )


def order(runs: int, size: int = 10_000_000, batch: int = 512) -> None:
    """P4."""
    labels = np.zeros(size, np.int64)
    made = TrainingOrder(np.arange(size), labels, 0, batch, None, drop_last=True)
    found = medians({"epoch": lambda: made.epoch(3)}, runs)["epoch"]
    print(f"P4 order of {size:,} samples: {found:.2f} s an epoch; its state is (seed, epoch, step): 3 numbers")


if __name__ == "__main__":
    main()
