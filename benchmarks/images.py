"""P13: CPU time from JPEGs of any size to training-ready images, by a random resized crop.

    python benchmarks/images.py [--shards DIR] [--size 224] [--images 512] [--runs 5] [--dali]

Training-ready: a part of 8 to 100 % of the area scaled to 224 x 224 with antialiasing, mirrored by a coin, normalised,
batches of 64, float32, in one process. Peers read the same bytes from the same shards and use torchvision's v2
transforms; --dali needs nvidia-dali-cuda120, and shows NVIDIA DALI on the CPU. All sides in turn; CPU time is that of
all threads; the process keeps the memory that it frees. Without --shards, images of 224 x 224, 500 x 375 and
1000 x 750 are generated: Pillow's JPEGs of quality 90.
"""

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from timing import medians
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from dlops_dist.config import Augment
from dlops_dist.data.augment import Augmenter, Normalize
from dlops_dist.data.crops import crop_of, opened, scaled, seen
from dlops_dist.data.images import decode
from dlops_dist.data.loader import read_ahead
from dlops_dist.data.memory import keep_freed_memory
from dlops_dist.data.pack import pack
from dlops_dist.data.random_crops import in_epoch
from dlops_dist.data.shapes import CLASSES, draw
from dlops_dist.data.shards import Split, read_manifest
from dlops_dist.data.sources import ImageFolder

BATCH = 64
CPU = torch.device("cpu")
DIFFERENT = 64
"""Images that are generated; of more, each is there several times."""
AREA = (0.08, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, help="packed with --keep, JPEGs alone")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=8 * BATCH, help="read by each side in each run")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dali", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.shards:
            compare(arguments.shards, arguments)
            return
        for height, width in ((224, 224), (375, 500), (750, 1000)):
            compare(generated(Path(folder) / f"{width}x{height}", height, width, arguments.images), arguments)


def generated(folder: Path, height: int, width: int, number: int) -> Path:
    jpegs = []
    for i in range(DIFFERENT):
        file = io.BytesIO()
        Image.fromarray(draw(i % len(CLASSES), i, max(height, width))[:height]).save(file, "JPEG", quality=90)
        jpegs.append(file.getvalue())
    for i in range(number + 2):
        path = folder / "tree" / ("test" if i < 2 else "train") / CLASSES[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpegs[i % DIFFERENT])
    pack(ImageFolder(folder / "tree"), folder / "shards", "generated", keep=True)
    return folder / "shards"


def compare(shards: Path, arguments: argparse.Namespace) -> None:
    manifest, size = read_manifest(shards), arguments.size
    chosen = Augment(size=size, resized_crop=AREA[0])
    split = opened(shards, manifest, "train", chosen)
    number = min(arguments.images, len(split)) // BATCH * BATCH
    order = np.random.default_rng(0).permutation(len(split))[:number].reshape(-1, BATCH)
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: consumed(ours(split, chosen, order)),
        "ours, as evaluated": lambda: consumed(ours(split, Augment(size=size, crop_padding=0, flip=False), order)),
        "torchvision.io + v2": lambda: consumed(theirs(split, size, order, by_torchvision)),
        "simplejpeg + v2": lambda: consumed(theirs(split, size, order, by_simplejpeg)),
        "PIL + v2": lambda: consumed(theirs(split, size, order, by_pil)),
    }
    if arguments.dali:
        pipeline = dali(split, size, order)
        sides["NVIDIA DALI, CPU"] = lambda: [pipeline.run() for _ in order]
    bytes_each = sum(shard.bytes for shard in manifest.shards) / sum(manifest.splits.values())
    (height, width), *_ = split.sizes(order[0])
    print(f"{width} x {height} (the first), {bytes_each / 1e3:.0f} kB each -> {size}, {number} images:")
    cpu = medians(sides, arguments.runs, time.process_time)
    for name in sides:
        each, ratio = 1e6 * cpu[name] / number, cpu[name] / cpu["ours"]
        print(f"  {name:22} {each:7.0f} us of CPU time an image, {ratio:5.2f} x ours")
    parts(split, size, order[0], arguments.runs)


def consumed(batches: Iterator[torch.Tensor]) -> None:
    for _ in batches:
        pass


def ours(split: Split, chosen: Augment, order: np.ndarray) -> Iterator[torch.Tensor]:
    manifest = split.manifest
    changed = Augmenter(chosen, 0, manifest.mean, CPU)
    normalize = Normalize(manifest.mean, manifest.std, torch.float32)
    parts = ((ids, slice(0, BATCH)) for ids in order)
    for batch in read_ahead(in_epoch(split, chosen, 0, 0), parts, CPU, threads=1, prefetch=2):
        yield normalize(changed(batch.images, batch.ids, 0))


def by_torchvision(data: bytes) -> torch.Tensor:
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def by_simplejpeg(data: bytes) -> torch.Tensor:
    return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)


def by_pil(data: bytes) -> torch.Tensor:
    return v2.functional.to_image(Image.open(io.BytesIO(data)).convert("RGB"))


def theirs(split: Split, size: int, order: np.ndarray, read: Callable[[bytes], torch.Tensor]) -> Iterator[torch.Tensor]:
    """Checksums of what is read are compared here too."""
    manifest = split.manifest
    change = v2.Compose([
        v2.RandomResizedCrop(size, AREA, antialias=True), v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(manifest.mean, manifest.std),
    ])  # fmt: skip
    for ids in order:
        images: list[torch.Tensor] = []
        split.each(ids, lambda _, data, images=images: images.append(change(read(data))))
        yield torch.stack(images)


def dali(split: Split, size: int, order: np.ndarray):  # type: ignore[no-untyped-def]
    from nvidia.dali import fn, pipeline_def, types

    mean, std = ([255 * x for x in values] for values in (split.manifest.mean, split.manifest.std))
    batches = iter(lambda: 0, 1)

    def source():  # type: ignore[no-untyped-def]
        for _ in batches:
            for ids in order:
                data: list[np.ndarray] = []
                split.each(ids, lambda _, content, data=data: data.append(np.frombuffer(content, np.uint8)))
                yield data

    alone = {"prefetch_queue_depth": 1, "exec_async": False, "exec_pipelined": False}  # no work while others are timed

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, **alone)
    def made():  # type: ignore[no-untyped-def]
        encoded = fn.external_source(source=source(), dtype=types.UINT8)
        images = fn.decoders.image_random_crop(
            encoded, device="cpu", random_area=AREA, random_aspect_ratio=[3 / 4, 4 / 3]
        )
        images = fn.resize(images, size=(size, size), antialias=True, interp_type=types.INTERP_LINEAR)
        return fn.crop_mirror_normalize(
            images, mirror=fn.random.coin_flip(), mean=mean, std=std, dtype=types.FLOAT, output_layout="CHW"
        )

    pipeline = made()
    pipeline.build()
    return pipeline


def parts(split: Split, size: int, ids: np.ndarray, runs: int) -> None:
    """What the time goes into, of whole images."""
    datas: list[bytes] = []
    split.each(ids, lambda _, data: datas.append(data))
    sizes, crop = split.sizes(ids), crop_of(Augment(size=size))
    pixels = [decode(data, "jpg") for data in datas]
    images = torch.from_numpy(split.read(ids))
    flip = Augmenter(Augment(crop_padding=0), 0, split.manifest.mean, CPU)
    normalize = Normalize(split.manifest.mean, split.manifest.std, torch.float32)
    sides: dict[str, Callable[[], object]] = {
        "read, checksum": lambda: split.each(ids, lambda place, data: None),
        "decode": lambda: [decode(data, "jpg") for data in datas],
        "scale": lambda: [scaled(image, size) for image in pixels],
        "scale by Pillow": lambda: [
            np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in pixels
        ],
        "decode, cut and scale the middle": lambda: [
            seen(data, "jpg", *shape, crop.box(*shape), size) for data, shape in zip(datas, sizes, strict=True)
        ],
        "flip": lambda: flip(images, torch.from_numpy(ids), 0),
        "normalise": lambda: normalize(images),
    }
    found = medians(sides, runs, time.process_time)
    print("  of it: " + ", ".join(f"{name} {1e6 * seconds / len(ids):.0f} us" for name, seconds in found.items()))


if __name__ == "__main__":
    sys.exit(main())
