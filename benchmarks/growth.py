"""How costs grow with samples, classes and workers: of each what it was at ab4d460, what it is now, what is wanted.

    python benchmarks/growth.py [--samples 10000000] [--only WORD ...]

Ten million samples are an index of so many over a few small images; where a row is a formula, it says so. CPU time of
this process, and the growth of its peak, each in a process of its own: both hold beside other load. Needs 6 GB.
"""

import argparse
import io
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

D, G, RANKS = 512, 65_536, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--only", nargs="*", default=[""], help="rows in whose name one of these words is")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, before, wanted, measure in ROWS:
            if any(word in name for word in arguments.only):
                found = measure(Path(folder), arguments.samples)
                print(f"{name}: before {before}; now {found}; wanted {wanted}", flush=True)


def apart(function: Callable[..., float], *given: object) -> tuple[float, float, float]:
    """CPU seconds, the growth of the peak in MB, and what a function gives, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (function, given))


def _measured(function, given) -> tuple[float, float, float]:
    run = function(*given)
    before, started = peak_mb(), time.process_time()
    value = run()
    return time.process_time() - started, peak_mb() - before, value


def peak_mb(process: str = "self") -> float:
    return int(Path(f"/proc/{process}/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


# samples


def shards_of(folder: Path, number: int) -> Path:
    """A folder whose index holds so many training samples, all of the same few images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dlops_dist.data.index import INDEX
    from dlops_dist.data.pack import pack
    from dlops_dist.data.shapes import write_tiny_imagenet
    from dlops_dist.data.shards import MANIFEST, read_manifest
    from dlops_dist.data.sources import TinyImageNet
    from dlops_dist.files import sha256_of

    shards = folder / f"shards-{number}"
    if not shards.exists():
        write_tiny_imagenet(folder / "shapes.zip", train_per_class=20, test_per_class=2, size=32)
        manifest = pack(TinyImageNet(folder / "shapes.zip"), shards, "shapes", workers=1)
        table = pq.read_table(shards / INDEX)
        train = table.slice(0, manifest.splits["train"])
        places = np.random.default_rng(0).integers(0, len(train), number)
        many = {name: train[name].to_numpy()[places] for name in train.column_names if name != "key"}
        many["key"] = pa.array([f"n{place:08d}_{i}" for i, place in enumerate(places.tolist())])
        many = pa.table({name: many[name] for name in train.column_names}, schema=table.schema)
        pq.write_table(pa.concat_tables([many, table.slice(len(train))]), shards / INDEX)
        values = json.loads((shards / MANIFEST).read_text())
        values["index_sha256"] = sha256_of(shards / INDEX)
        values["splits"]["train"] = values["shards"][0]["samples"] = number
        (shards / MANIFEST).write_text(json.dumps(values))
        read_manifest(shards)
    return shards


def first_step(shards: Path, loss: str) -> tuple[float, float]:
    """CPU seconds of a run to its first step, and its peak in MB."""
    runs = shards.parent / f"runs-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "dlops_dist.train", "q1", "--local", "--loss", loss, "--name", "run"]
    command += ["--runs-dir", str(runs), "--data.shards", str(shards), "--data.reader", "decode"]
    command += ["--checkpoint-every", "1", "--model.stem", "imagenet", "--model.width", "8"]
    command += ["--data.samples-per-class", "16"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not list(runs.glob("run/checkpoints/step-*.pt")):
        if process.poll() is not None:
            raise SystemExit("train ended before its first step")
        time.sleep(0.01)
    user, system = map(int, Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13])
    peak = peak_mb(str(process.pid))
    process.kill()
    process.wait()
    return (user + system) / 100, peak


def of_samples(loss: str) -> Callable[[Path, int], str]:
    def measure(folder: Path, number: int) -> str:
        few, many = (first_step(shards_of(folder, size), loss) for size in (10_000, number))
        return f"+{many[0] - few[0]:.1f} s, +{many[1] - few[1]:.0f} MB"

    return measure


def balanced(number: int):
    from dlops_dist.data.order import Balance

    labels = np.random.default_rng(0).integers(0, 1000, number)
    return lambda: float(len(next(Balance(labels, 512, 4).epoch(0, 0))))


# classes


def center(num_classes: int):
    import torch

    from dlops_dist.losses import CenterLoss

    torch.set_num_threads(1)
    loss, x, labels = CenterLoss(num_classes, D), torch.randn(512, D), torch.randint(num_classes, (512,))
    loss.centers.add_(1)
    loss.move(x, labels)

    def moved() -> float:
        started = time.process_time()
        for _ in range(10):
            loss.move(x, labels)
        return (time.process_time() - started) / 10

    return moved


def evaluation(num_classes: int):
    import torch

    from dlops_dist.engine.evaluation import evaluate
    from dlops_dist.engine.learner import Learner
    from dlops_dist.engine.samples import Inputs
    from dlops_dist.recipes.q1 import Settings

    class Images:
        in_memory = True
        labels = np.arange(2560) % num_classes

        def read(self, ids: np.ndarray) -> np.ndarray:
            return np.zeros((len(ids), 16, 16, 3), np.uint8)

    settings = Settings(model={"width": 8, "stem": "imagenet"}, blocks=1, exactness="bits")
    learner = Learner(settings, Inputs(num_classes, (0.5,) * 3, (0.25,) * 3, (16, 16)), 1, torch.device("cpu"))
    evaluate(learner, Images(), np.arange(256))
    return lambda: float(evaluate(learner, Images(), np.arange(2560))["top1"] or 0)


def recall(number: int):
    import torch

    from dlops_dist.metrics import Judged, Points, recall_at

    torch.set_num_threads(1)
    x, labels = torch.randn(number, D), torch.arange(number) // 4

    def all_judged() -> float:
        points, total = Points(x), 0.0
        for first in range(0, number, 256):
            place = slice(first, min(first + 256, number))
            judged = Judged(x[place], labels[place], x[:, :0], x, x, labels, place, 4, points=points)
            total += recall_at(1)(judged).sum()
        return float(total)

    return all_judged


# workers


def triplets(batch: int):
    import torch

    from dlops_dist.losses import TripletLoss

    torch.set_num_threads(1)
    x, labels = torch.randn(batch, D, requires_grad=True), torch.randperm(batch) // 4
    part, loss = slice(batch // 2, batch // 2 + batch // RANKS), TripletLoss()

    def mined() -> float:
        loss.terms(x, labels, part, largest_class=4).sum.backward()
        return 0.0

    mined()
    return mined


def hashed(number: int):
    import torch

    from dlops_dist.distributed.agreement import bits_hash

    x = torch.randn(number)
    return lambda: float(bits_hash(x))


def packed(number: int):
    from dlops_dist.data import pack as pack_module
    from dlops_dist.data.sources import Listing

    image = io.BytesIO()
    np.save(image, np.random.default_rng(0).integers(0, 256, (192, 192, 3), np.uint8))

    class Images:
        path, extension, classes = Path("memory"), "npy", ["all"]
        splits = {"train": Listing([f"{i:05d}" for i in range(number)], np.zeros(number, np.int64))}  # noqa: RUF012

        def read(self, split: str, index: int) -> bytes:
            return image.getvalue()

        def name(self, split: str, index: int) -> str:
            return str(index)

        def stamp(self) -> str:
            return ""

    def run() -> float:
        with tempfile.TemporaryDirectory() as out:
            pack_module.pack(Images(), Path(out), "memory", workers=1)
        return 0.0

    return run


def events():
    def imported() -> float:
        import dlops_dist.events  # noqa: F401

        return float("torch" in sys.modules)

    return imported


def cpu(function: Callable, *given: object) -> Callable[[Path, int], str]:
    return lambda folder, samples: "{:.2f} s, +{:.0f} MB".format(*apart(function, *given))


def sync_norm(folder: Path, samples: int) -> str:
    """Of ResNet-18's 20 norms of 4,800 channels, against 11.2 million gradients."""
    from scaling import norm_share

    return ", ".join(f"{100 * norm_share(ranks):.2f} % at {ranks}" for ranks in (2, 8, 64, RANKS))


ROWS = [
    ("5, 6 first step, ce, against 10,000 samples", "+14.3 s, +2,200 MB", "+3 s, +400 MB", of_samples("ce")),
    ("6, 15 first step, triplet, against 10,000 samples", "+23.8 s", "+3 s, +400 MB", of_samples("triplet")),
    ("15 balanced order to its first batch", "5.6 s", "-", lambda _, n: f"{apart(balanced, n)[0]:.1f} s"),
    ("1 evaluation, 2,000 classes, 2,560 images", "+1,582 MB", "no C x C", cpu(evaluation, 2000)),
    ("12 Recall@1 of 10,000 embeddings", "3.4 s (at 366dd81)", "prepared once", cpu(recall, 10_000)),
    ("7 centre update, 10^6 classes", "1,046 ms, +1,968 MB", "5 ms, O(B D)",
     lambda *_: "{2:.4f} s, +{1:.0f} MB".format(*apart(center, 10**6))),
    ("9 triplets of one rank of 1,024, G = 65,536", "2.19 s", "0.6 s", cpu(triplets, G)),
    ("16 hash of 400 MB", "5.7 x the tensor", "less than it", cpu(hashed, 10**8)),
    ("8 packing 5,000 x 110 kB", "+1,067 MB", "one image", cpu(packed, 5000)),
    ("14 torch in the process of events", "646 to 721 MB", "not", lambda *_: f"{apart(events)[2]:.0f} (1: imported)"),
    ("4 sync norm's bytes, of the gradients', formula", "5.5 % at 64, 87 % at 1,024", "1 %", sync_norm),
    ("3 sums in a checkpoint, W = 1,024, C = 1,000, D = 512, formula", "2.1 GB", "1.1 GB at most, or C (D + 1) once",
     lambda *_: f"{1000 * 513 * 4 / 1e6:.1f} MB, kept once"),
    ("13 reads of a checkpoint on resume, W = 1,024, formula", "1,024 x 147 MB", "one", lambda *_: "one, broadcast"),
]  # fmt: skip

if __name__ == "__main__":
    main()
