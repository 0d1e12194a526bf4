"""Sections of gpu.py that measure: 1, 7 to 10, and 12."""

import json
import re
import statistics
import time
from functools import cache

import torch
from gpu_tools import (
    LOSSES,
    Made,
    Row,
    Setup,
    Training,
    alternate,
    at_least,
    at_most,
    batches_of,
    default_numerics,
    durations,
    each,
    peak_growth,
    relative,
    say,
    synchronize,
)
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from dlops_dist.data.readers import DeviceReader, open_readers
from dlops_dist.data.shards import Split, read_manifest
from dlops_dist.engine import fit
from dlops_dist.engine.run_folder import RunFolder
from dlops_dist.losses import CenterLoss, TripletLoss

MARGIN, SAMPLES_PER_CLASS = 0.5, 4
CENTER_BATCH = 512
TINY_IMAGENET_IMAGES = 100_000
PROFILED_STEPS = 5
LEAST_RUN_S = 40
"""Compiling alone takes most of it."""
KINDS = {
    "optimiser": r"multi_tensor|foreach|fusedsgd|fused_sgd",
    "batch norm, fused": r"triton|batch_?norm|bn_fw|bn_bw|batchnorm",
    "copy, fill, layout": r"memcpy|memset|copy|fill|nchwtonhwc|nhwctonchw|catarray",
    "convolution, product": r"conv|gemm|xmma|cutlass|wgrad|dgrad|nvjet|mm\b|implicit",
}
"""By what the names of kernels contain, in lower case; the first that fits."""


def nothing() -> None:
    """What a side has to do before its steps, if it shares all with the others."""


def ceilings(setup: Setup):
    """1: what the device reaches at most: a bf16 product of random matrices, and a copy counted as read and written."""
    yield Row("bf16 product", product_rate(setup), "TFLOP/s")
    source = torch.empty(setup.size.copied, dtype=torch.uint8, device=setup.device).random_()
    target = torch.empty_like(source)
    seconds = _median(lambda: target.copy_(source), setup)
    yield Row("copy", 2 * setup.size.copied / seconds / 1e12, "TB/s")


@cache
def product_rate(setup: Setup) -> float:
    """TFLOP/s."""
    size = setup.size.product
    a, b = (torch.randn(size, size, device=setup.device).bfloat16() for _ in range(2))
    return 2 * size**3 / _median(lambda: a @ b, setup) / 1e12


def _median(step, setup: Setup) -> float:
    """Seconds of a call, after some that are not counted."""
    durations(step, 3, setup.device)
    return statistics.median(durations(step, setup.size.steps, setup.device))


class Bare:
    """torchvision's resnet18 as anyone writes its loop; images are in memory and are only normalised."""

    def __init__(self, setup: Setup, images: Made, batch: int) -> None:
        import torchvision

        model = torchvision.models.resnet18(num_classes=setup.size.classes)
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        model = model.to(setup.device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, fused=True)
        self.network = torch.compile(model) if setup.size.compiled else model
        self.images = torch.from_numpy(images.pixels).to(setup.device)
        self.labels = torch.from_numpy(images.labels).to(setup.device)
        self.device, self.batch = setup.device, batch

    def ready(self) -> None:
        default_numerics(self.device)

    def __call__(self) -> None:
        ids = torch.randint(len(self.images), (self.batch,), device=self.device)
        images = (self.images[ids].permute(0, 3, 1, 2).float() - 115) / 70
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = F.cross_entropy(self.network(images), self.labels[ids])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


@cache
def pair(setup: Setup, batch: int):
    """Ours and the bare loop after their first steps, and how long those took."""
    torch._dynamo.reset()  # of another batch size it would make kernels for any
    size = setup.size
    images = Made(size.resident, size.image, size.classes)
    settings = setup.settings(LOSSES["ce"], global_batch_size=batch, deterministic=setup.arguments.deterministic)
    ours = Training(settings, DeviceReader(images, setup.device), size.classes, setup.device)
    sides = {"ours": ours, "bare": Bare(setup, images, batch)}
    first = {}
    for name, side in sides.items():
        side.ready()
        started = time.perf_counter()
        side()
        synchronize(setup.device)
        first[name] = time.perf_counter() - started
    return sides, first


def throughput(setup: Setup):
    """7: a step of cross-entropy with all that belongs to it, against the bare loop, in turn."""
    for batch in setup.size.batches:
        sides, first = pair(setup, batch)
        for name, seconds in first.items():
            yield Row(f"batch {batch}: first step, {name}", seconds, "s")
        found = alternate({name: (side.ready, side) for name, side in sides.items()}, setup)
        rates = {name: batch / statistics.median(seconds) for name, seconds in found.items()}
        for name, rate in rates.items():
            share = rate * setup.size.gflop / 1e3 / product_rate(setup)
            yield Row(f"batch {batch}: {name}", rate, "images/s")
            yield Row(f"batch {batch}: longest step, {name}", 1e3 * max(found[name]), "ms")
            limit = 0.25 if name == "ours" and batch == setup.size.batches[-1] else None
            yield at_least(f"batch {batch}: share of the product's rate, {name}", share, limit, judged=setup.gpu)
        ratio = rates["ours"] / rates["bare"]
        yield at_least(f"batch {batch}: ours / bare", ratio, 1.0, judged=setup.gpu)
        for name, side in sides.items():
            side.ready()
            yield Row(f"batch {batch}: memory that a step adds, {name}", peak_growth(side, setup.device), "MB")


def data_wait(setup: Setup):
    """8: steps whose batches are fetched, against the same step on one batch that is held."""
    batch = setup.size.batches[-1]
    ours = pair(setup, batch)[0]["ours"]
    ours.ready()
    split = Split(setup.shards, read_manifest(setup.shards), "train")
    sources = {"device": ours.batches}
    for kind in ("decoded", "decode"):
        (reader,) = open_readers([split], kind, str(setup.scratch / "cache"), setup.device, say, say).readers
        sources[kind] = batches_of(reader, ours.settings, setup.size.classes, setup.device)
    held = next(ours.batches)
    sides = {"held": (nothing, lambda: ours.learner.step([held], 0, 0))}
    for kind, batches in sources.items():
        sides[kind] = nothing, lambda batches=batches: ours.learner.step([next(batches)], 0, 0)
    means = {name: statistics.fmean(seconds) for name, seconds in alternate(sides, setup).items()}
    yield Row("a step, batch held", 1e3 * means["held"], "ms")
    for kind in sources:
        share = 1 - means["held"] / means[kind]
        limit = 0.01 if kind == "device" else None
        yield at_most(f"{kind}: share of a step", share, limit, judged=setup.gpu)


def profiled(setup: Setup):
    """9: what five steps are made of, ours and bare. On a CPU operations stand for kernels."""
    for name, side in pair(setup, setup.size.batches[-1])[0].items():
        side.ready()
        side()
        trace = _trace(side, setup)
        work = _device_work(trace, setup.gpu)
        times = dict.fromkeys([*KINDS, "other"], 0.0)
        for event in work:
            times[_kind(event["name"])] += event["dur"] / 1e3 / PROFILED_STEPS
        details = "\n".join(f"{spent:8.2f} ms  {kernel}" for kernel, spent in _longest(work))
        yield Row(f"{name}: kernels", len(work) / PROFILED_STEPS, "a step", details=details)
        for kind, spent in times.items():
            yield Row(f"{name}: {kind}", spent, "ms a step")
        yield Row(f"{name}: idle share", _idle(work))
        if name == "ours":
            outside = _launched_outside(trace, setup.gpu) / PROFILED_STEPS
            yield at_most("ours: launched outside the compiled graph", outside, 30, "a step", judged=setup.gpu)


def _trace(side, setup: Setup) -> list[dict]:
    """The timed events of some steps, as the profiler writes them for a browser."""
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * setup.gpu]
    with profile(activities=activities, acc_events=True) as found:
        for _ in range(PROFILED_STEPS):
            side()
        synchronize(setup.device)
    path = setup.scratch / "trace.json"
    found.export_chrome_trace(str(path))
    return [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]


def _device_work(trace, gpu) -> list[dict]:
    """Kernels and copies of a GPU in order of their start; on a CPU the operations that others are not part of."""
    if gpu:
        kinds = ("kernel", "gpu_memcpy", "gpu_memset")
        return sorted((e for e in trace if e.get("cat") in kinds), key=lambda event: event["ts"])
    work, end = [], {}
    for event in sorted((e for e in trace if e.get("cat") == "cpu_op"), key=lambda event: (event["ts"], -event["dur"])):
        if event["ts"] >= end.get(event["tid"], 0):
            work.append(event)
            end[event["tid"]] = event["ts"] + event["dur"]
    return work


def _kind(name) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), "other")


def _longest(work) -> list[tuple[str, float]]:
    """The kernels that take most, with their ms in all steps."""
    times: dict[str, float] = {}
    for event in work:
        times[event["name"][:90]] = times.get(event["name"][:90], 0.0) + event["dur"] / 1e3
    return sorted(times.items(), key=lambda item: -item[1])[:8]


def _idle(work) -> float:
    """Share of the time from the first start to the last end in which nothing runs."""
    busy, end = 0.0, work[0]["ts"]
    for event in work:
        last = event["ts"] + event["dur"]
        busy += max(0.0, last - max(end, event["ts"]))
        end = max(end, last)
    return 1 - busy / (end - work[0]["ts"])


def _launched_outside(trace, gpu) -> int:
    """Kernels whose launch falls into no call of a compiled graph."""
    launch = r"cu(da)?Launch(Cooperative)?Kernel"
    launched = [e for e in trace if re.match(launch, e["name"])] if gpu else _device_work(trace, gpu)
    calls = [e for e in trace if "CompiledFxGraph" in e["name"] and not e.get("cat", "").startswith("gpu")]
    spans = [(call["ts"], call["ts"] + call["dur"]) for call in calls]
    return sum(not any(first <= event["ts"] <= last for first, last in spans) for event in launched)


def losses(setup: Setup):
    """10: batch-hard triplets forward and backward against pytorch-metric-learning's, then centre loss with update."""
    try:
        import pytorch_metric_learning  # noqa: F401
    except ImportError:
        yield Row("pytorch-metric-learning", "not installed")
    else:
        yield from each(lambda number: _mined(setup, number), setup.size.mined)
    yield from each(lambda number: _centers(setup, number), setup.size.centers)


def _mined(setup: Setup, number):
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import BatchHardMiner
    from pytorch_metric_learning.reducers import MeanReducer

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(number, setup.size.dim, generator=generator).to(setup.device).requires_grad_()
    labels = (torch.arange(number) // SAMPLES_PER_CLASS).to(setup.device)
    distance = LpDistance(normalize_embeddings=False)
    miner = BatchHardMiner(distance=distance)
    reference = TripletMarginLoss(margin=MARGIN, distance=distance, reducer=MeanReducer())
    loss = TripletLoss(MARGIN, normalize=False)

    def stepped(value_of):
        def step():
            x.grad = None
            value = value_of()
            value.backward()
            return value

        return step

    ours, theirs = stepped(lambda: loss(x, labels)), stepped(lambda: reference(x, labels, miner(x, labels)))
    value, gradient = ours().detach(), x.grad
    wanted, wanted_gradient = theirs().detach(), x.grad
    yield at_most(f"{number} triplets: value", relative(value, wanted), 1e-5)
    yield at_most(f"{number} triplets: gradient", relative(gradient, wanted_gradient), 1e-4)
    found = alternate({"ours": (nothing, ours), "theirs": (nothing, theirs)}, setup)
    seconds = {name: statistics.median(found[name]) for name in found}
    memory = {name: peak_growth(step, setup.device) for name, step in (("ours", ours), ("theirs", theirs))}
    for name in found:
        yield Row(f"{number} triplets: {name}", 1e3 * seconds[name], "ms")
    faster, less = (1, 1 / 3) if number == setup.size.mined[-1] else (None, None)
    yield at_least(f"{number} triplets: times as fast", seconds["theirs"] / seconds["ours"], faster, "x", setup.gpu)
    yield Row(f"{number} triplets: memory", memory["ours"], "MB")
    share = memory["ours"] / memory["theirs"]
    yield at_most(f"{number} triplets: share of their memory", share, less, judged=setup.gpu)


def _centers(setup: Setup, number):
    x = torch.randn(CENTER_BATCH, setup.size.dim, device=setup.device, requires_grad=True)
    labels = torch.randint(number, (CENTER_BATCH,), device=setup.device)
    loss = CenterLoss(number, setup.size.dim).to(setup.device)

    def step() -> None:
        x.grad = None
        loss(x, labels).backward()
        loss.update(loss.sums(x.detach(), labels))

    yield Row(f"{number:,} centres: loss and update", 1e3 * _median(step, setup), "ms")
    yield Row(f"{number:,} centres: memory", peak_growth(step, setup.device), "MB")


def whole_runs(setup: Setup):
    """12: runs of q1 on the shards that were named, as far as they come in the time that is left; each its share."""
    arguments = setup.arguments
    for place, loss in enumerate(arguments.losses):
        left = setup.deadline - time.monotonic()
        if left < LEAST_RUN_S:
            yield Row(f"{loss}: left out, seconds left", left)
            continue
        yield from _run(setup, loss, time.monotonic() + left / (len(arguments.losses) - place))


def _run(setup: Setup, loss, deadline):
    torch._dynamo.reset()
    arguments, runs = setup.arguments, setup.scratch / "runs"
    shards = arguments.shards or setup.shards
    epochs, batch = (arguments.epochs, arguments.batch) if arguments.shards else (2, setup.size.batch)
    data = {"shards": str(shards), "reader": "device", "cache_dir": str(setup.scratch / "cache")}
    values = {"loss": loss, "name": f"q1-{loss}", "runs_dir": str(runs), "epochs": epochs, "data": data}
    if loss == "triplet":
        values["triplet"] = {"mining": "all", "average": "active", "ce_weight": 1.0}
    started = time.monotonic()
    try:
        fit(
            setup.settings(values, global_batch_size=batch), device=setup.device,
            stop=lambda: time.monotonic() > deadline,
        )  # fmt: skip
    except KeyboardInterrupt:
        if time.monotonic() < deadline:
            raise
    rows = RunFolder(runs / f"q1-{loss}").rows()
    yield Row(f"{loss}: epochs of {epochs}", len(rows))
    yield Row(f"{loss}: start, training and evaluation", time.monotonic() - started, "s")
    if not rows:
        return
    for name in ("top1", "top5", "nearest_center", "recall_at_1"):
        yield Row(f"{loss}: test {name} of epoch {len(rows)}", 100 * rows[-1][f"test/{name}"], "%")
    yield Row(f"{loss}: training", statistics.median(row["train_images_per_s"] for row in rows), "images/s")
    images = read_manifest(shards).splits["train"]
    limit = 60 if loss == "ce" and images == TINY_IMAGENET_IMAGES else None
    ten = 10 * statistics.median(row["epoch_s"] for row in rows)
    yield at_most(f"{loss}: ten epochs of {images:,} images", ten, limit, "s", judged=setup.gpu)
