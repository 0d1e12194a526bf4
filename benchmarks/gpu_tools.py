"""What the sections of gpu.py share: rows, sizes, the clock, images in memory and learners.

Without a GPU everything runs in miniature on the CPU: the same functions, of other sizes, by another clock.
"""

import time
import traceback
from functools import cached_property
from itertools import count, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dlops_dist.data.loader import TrainingOrder, read_ahead
from dlops_dist.data.order import fit_samples_per_class, rank_part
from dlops_dist.data.pack import pack
from dlops_dist.data.readers import DeviceReader
from dlops_dist.data.shapes import write_tiny_imagenet
from dlops_dist.data.sources import TinyImageNet
from dlops_dist.distributed.collectives import rank, world_size
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.numerics import set_numerics
from dlops_dist.engine.samples import Inputs
from dlops_dist.recipes.q1 import Settings as Q1

MEAN, STD = (0.48, 0.45, 0.4), (0.28, 0.27, 0.28)
STEPS_PER_EPOCH = 100
LOSSES = {
    "ce": {"loss": "ce"},
    "batch-hard": {"loss": "triplet", "triplet": {"mining": "batch-hard"}},
    "semi-hard": {"loss": "triplet", "triplet": {"mining": "semi-hard"}},
    "all": {"loss": "triplet", "triplet": {"mining": "all"}},
    "centre": {"loss": "center", "center": {"weight": 1.0}},
}


class Row(NamedTuple):
    """A figure, and whether it is what is wanted."""

    name: str
    value: object
    unit: str = ""
    target: str = ""
    ok: bool | None = None
    """None where nothing is wanted, or not on this device."""
    details: str = ""
    """Printed below."""


def at_most(name, value, limit, unit="", judged=True, details="") -> Row:
    """Nothing is wanted where the limit is None."""
    if limit is None:
        return Row(name, value, unit, details=details)
    return Row(name, value, unit, f"<= {limit:.3g}", bool(value <= limit) if judged else None, details)


def at_least(name, value, limit, unit="", judged=True) -> Row:
    if limit is None:
        return Row(name, value, unit)
    return Row(name, value, unit, f">= {limit:.3g}", bool(value >= limit) if judged else None)


def failed(name, error: Exception) -> Row:
    """Of what raised."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return Row(name, type(error).__name__, target="no error", ok=False, details="\n".join(lines[-9:]))


def each(check, cases):
    """The rows of check(case) for each case. One that raises is a failed row; the others go on."""
    for case in cases:
        try:
            yield from check(case)
        except Exception as error:
            yield failed(str(case), error)


class Size(NamedTuple):
    """How large everything is."""

    product: int
    """Rows and columns of the matrices of section 1."""
    copied: int
    """Bytes of its copy."""
    small_width: int
    """Of the network in sections 2, 3, 5 and 6; so are the next three."""
    small_image: int
    small_batch: int
    small_classes: int
    width: int
    """Of the network elsewhere; so are the next four."""
    image: int
    classes: int
    batch: int
    """Of the sections that do not measure speed."""
    batches: tuple[int, ...]
    """Of those that do; the last one is that of the data wait and the profile."""
    gflop: float
    """Of one image, forward and backward, at this width and size."""
    resident: int
    """Images in memory in section 7."""
    per_class: int
    """Generated training images of each of ten classes."""
    rounds: int
    steps: int
    """In each round of a measurement."""
    repeated: int
    """Steps of section 4."""
    trend: int
    """Steps of section 11."""
    mined: tuple[int, ...]
    """Samples in section 10, of so many values, then numbers of centres."""
    dim: int
    centers: tuple[int, ...]
    compiled: bool


FULL = Size(
    product=8192, copied=2**32, small_width=16, small_image=32, small_batch=128, small_classes=20,
    width=64, image=64, classes=200, batch=128, batches=(128, 512), gflop=13.33, resident=65_536, per_class=300,
    rounds=3, steps=20, repeated=20, trend=300, mined=(128, 1024, 4096), dim=512, centers=(200, 100_000), compiled=True,
)  # fmt: skip
MINIATURE = Size(
    product=256, copied=2**22, small_width=8, small_image=16, small_batch=32, small_classes=10,
    width=8, image=16, classes=10, batch=16, batches=(4, 8), gflop=13.33 / 1024, resident=256, per_class=12,
    rounds=1, steps=2, repeated=4, trend=12, mined=(32, 64), dim=16, centers=(20, 200), compiled=False,
)  # fmt: skip


class Setup:
    """The device, the sizes that suit it, and what several sections use, made when the first of them asks for it."""

    def __init__(self, device: torch.device, scratch: Path, arguments, deadline: float) -> None:
        self.device, self.gpu, self.size = device, device.type == "cuda", FULL if device.type == "cuda" else MINIATURE
        self.scratch, self.arguments, self.deadline = scratch, arguments, deadline

    @cached_property
    def shards(self) -> Path:
        """Generated images of ten classes, packed."""
        archive = self.scratch / "shapes.zip"
        write_tiny_imagenet(archive, self.size.per_class, test_per_class=self.size.per_class // 6, size=self.size.image)
        pack(TinyImageNet(archive), self.scratch / "shards", "shapes", workers=1)
        return self.scratch / "shards"

    def settings(self, values, compiled=None, **changes) -> Q1:
        """Those of one of LOSSES at full width."""
        own = {"model": {"width": self.size.width}, "global_batch_size": self.size.batch}
        return Q1(**{"compile": self.size.compiled if compiled is None else compiled, **own, **values, **changes})

    def small_settings(self, values, **changes) -> Q1:
        """Those of one of LOSSES for a small network, not compiled."""
        own = {"model": {"width": self.size.small_width}, "global_batch_size": self.size.small_batch}
        return Q1(**{"compile": False, **own, **values, **changes})


class Made:
    """Random images in the memory of this process, as a reader."""

    in_memory = False

    def __init__(self, number: int, image: int, classes: int) -> None:
        values = np.random.default_rng(0).bytes(number * image * image * 3)
        self.pixels = np.frombuffer(bytearray(values), np.uint8).reshape(number, image, image, 3)
        self.labels = np.arange(number) % classes

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, ids):
        return self.pixels.take(ids, axis=0)


class Training:
    """A learner and its batches: each call is a step, as a run takes it."""

    def __init__(self, settings: Q1, reader, classes: int, device: torch.device) -> None:
        self.settings, self.device, self.taken = settings, device, 0
        self.learner = Learner(settings, Inputs(classes, MEAN, STD), STEPS_PER_EPOCH, device)
        self.batches = batches_of(reader, settings, classes, device)

    def __call__(self) -> torch.Tensor:
        self.taken += 1
        return self.learner.step([next(self.batches)], 0, self.taken - 1)

    def ready(self) -> None:
        set_numerics(self.settings, self.device)


def small_training(setup: Setup, values, device=None, **changes) -> Training:
    """A small network on few random images, which lie on the device."""
    size, device = setup.size, device or setup.device
    images = Made(4 * size.small_batch, size.small_image, size.small_classes)
    settings = setup.small_settings(values, **changes)
    set_numerics(settings, device)
    return Training(settings, DeviceReader(images, device), size.small_classes, device)


def batches_of(reader, settings: Q1, classes: int, device: torch.device):
    """This rank's parts of a run's batches, epoch after epoch, read ahead as in a run."""
    size, balanced = settings.global_batch_size, settings.loss == "triplet"
    per_class = fit_samples_per_class(size, classes) if balanced else None
    order = TrainingOrder(np.arange(len(reader)), reader.labels, settings.seed, size, per_class, True)
    parts = ((ids, rank_part(size, rank(), world_size())) for epoch in count() for ids in order.epoch(epoch))
    return read_ahead(reader, parts, device, settings.data.threads, settings.data.prefetch)


def say(text) -> None:
    """What the package tells and warns of."""
    print(f"  {text}", flush=True)


def default_numerics(device: torch.device) -> None:
    """As torch starts, but for the choice among convolutions by time: what a loop for speed has."""
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = device.type == "cuda"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def durations(step, number: int, device: torch.device) -> list[float]:
    """Seconds from the end of a step to that of the next, on the device's own clock: CUDA events on a GPU."""
    marks = [_mark(device)]
    for _ in range(number):
        step()
        marks.append(_mark(device))
    synchronize(device)
    return [_seconds(first, last) for first, last in pairwise(marks)]


def alternate(sides, setup: Setup) -> dict[str, list[float]]:
    """Seconds of each step of each side. They take their steps in turn, some at a time after one that is not counted.

    Args:
        sides: by name, (ready, step): what to call before its steps, and for each.
    """
    found = {name: [] for name in sides}
    for _ in range(setup.size.rounds):
        for name, (ready, step) in sides.items():
            ready()
            step()
            found[name] += durations(step, setup.size.steps, setup.device)
    return found


def peak_growth(step, device: torch.device) -> float:
    """MB by which a call raises what is allocated on a GPU; NaN on a CPU."""
    if device.type != "cuda":
        step()
        return float("nan")
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference, as a part of the norm of what is wanted."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((found - wanted).norm() / wanted.norm())


def flat_gradient(learner: Learner) -> torch.Tensor:
    """Of all parameters, on the CPU."""
    return torch.cat([parameter.grad.flatten() for parameter in learner.model.parameters()]).cpu()


def _mark(device: torch.device):
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(first, last) -> float:
    return last - first if isinstance(first, float) else first.elapsed_time(last) / 1e3
