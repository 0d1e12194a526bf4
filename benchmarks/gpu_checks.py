"""Sections of gpu.py that ask whether a GPU computes what is promised: 2 to 6, and 11."""

import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from gpu_tools import (
    LOSSES,
    MEAN,
    Made,
    Row,
    Setup,
    Training,
    at_most,
    each,
    flat_gradient,
    relative,
    say,
    small_training,
)
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dlops_dist.config import Augment
from dlops_dist.data.augment import Augmenter
from dlops_dist.data.readers import open_readers
from dlops_dist.data.shards import Split, read_manifest
from dlops_dist.distributed.norm import _SyncNormalize
from dlops_dist.distributed.ranks import run_ranks
from dlops_dist.engine import fit
from dlops_dist.engine.run_folder import RunFolder

CPU = torch.device("cpu")
EPS = 1e-5
READERS = ("device", "decoded", "decode")
SEVERAL_RANKS = ("ce", "batch-hard", "centre")
PACKAGE = "dlops_dist"
aten = torch.ops.aten
WAITED_FOR = (
    aten._local_scalar_dense, aten.nonzero, aten._unique2, aten.unique_dim, aten.masked_select, aten.bincount,
)  # fmt: skip
"""What a GPU must finish before the host knows how to go on."""
SYNCHRONISED = "called a synchronizing CUDA operation"
"""What torch's debug mode says of each."""


def correctness(setup: Setup):
    """2: one step on this device against the CPU, from equal weights; the norm against torch's; augmented bits."""
    norms = [(loss, norm) for loss in LOSSES for norm in ("sync", "local")]
    yield from each(lambda case: _step_as_on_a_cpu(setup, *case), norms)
    yield from each(lambda dtype: _norm_as_torchs(setup, dtype), [torch.float64, torch.bfloat16])
    yield from each(lambda name: _augmented_as_on_a_cpu(setup, name), AUGMENTS)


def _step_as_on_a_cpu(setup: Setup, loss, norm):
    model = {"width": setup.size.small_width, "norm": norm}
    found = {}
    for precision in ("float64", "float32"):
        for device in (setup.device, CPU):
            training = small_training(setup, LOSSES[loss], device, model=model, precision=precision)
            found[precision, device] = training().cpu(), flat_gradient(training.learner)
    (_, own), (_, wanted) = found["float64", setup.device], found["float64", CPU]
    yield at_most(f"{loss}, {norm} norm: float64 gradient", relative(own, wanted), 1e-10)
    (own, _), (wanted, _) = found["float32", setup.device], found["float32", CPU]
    yield at_most(f"{loss}, {norm} norm: float32 loss", relative(own, wanted), 1e-5)


def _norm_as_torchs(setup: Setup, dtype):
    """The sync norm's own function, which a single process does not call, against float64 or float32 batch norm."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (setup.size.small_batch, 2 * setup.size.small_width, setup.size.small_image, setup.size.small_image)
    x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x, dy = (t.to(setup.device, dtype, memory_format=torch.channels_last) for t in (3 * x + 1, dy))
    weight, bias = (torch.randn(shape[1], generator=generator).to(setup.device, wide) for _ in range(2))
    own = [t.clone().requires_grad_() for t in (x, weight, bias)]
    wanted = [t.clone().requires_grad_() for t in (x.to(wide), weight, bias)]
    y = _SyncNormalize.apply(*own, EPS)[0]
    y.backward(dy)
    reference = F.batch_norm(wanted[0], None, None, *wanted[1:], training=True, eps=EPS)
    reference.backward(dy.to(wide))
    pairs = {"y": (y, reference)} | {
        f"gradient of {name}": (a.grad, b.grad) for name, a, b in zip(("x", "weight", "bias"), own, wanted, strict=True)
    }
    for name, (a, b) in pairs.items():
        limit = 1e-12 if dtype == torch.float64 else 1e-2
        yield at_most(f"sync norm, {str(dtype).removeprefix('torch.')}: {name}", relative(a, b), limit)


AUGMENTS = {
    "crop and flip": {"crop_padding": 4, "flip": True},
    "cutout": {"crop_padding": 0, "flip": False, "cutout": 8},
    "colours": {"crop_padding": 0, "flip": False, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4},
    "resized crop": {"crop_padding": 0, "flip": False, "resized_crop": 0.25},
}


def _augmented_as_on_a_cpu(setup: Setup, name):
    """How many values are not the same bits; where floats are summed in another order some may differ."""
    size = setup.size
    made = Made(size.small_batch, size.small_image, size.small_classes)
    images, ids = torch.from_numpy(made.pixels), torch.arange(len(made)) + 2**33
    chosen = Augment(**AUGMENTS[name])
    wanted = Augmenter(chosen, 3, MEAN, CPU)(images, ids, 1)
    changed = Augmenter(chosen, 3, MEAN, setup.device, size.compiled)
    found = changed(images.to(setup.device), ids.to(setup.device), 1).cpu()
    different = int((found != wanted).sum())
    limit = 0 if name in ("crop and flip", "cutout") else None
    yield at_most(f"{name}: values that differ", different, limit, f"of {wanted.numel():,}")


def waits(setup: Setup):
    """3: how often a warm step, its batch fetched from a device reader, makes the host wait for the GPU.

    On a CPU nothing waits; counted are the operations that would make a GPU wait, and nothing is promised of them.
    """
    yield from each(lambda case: _waits_of(setup, *case), _cases(setup))


def _cases(setup: Setup):
    """Each loss as its kernels are written; one of them compiled, where that is worth its time."""
    return [(loss, False) for loss in LOSSES] + [("ce", True)] * setup.size.compiled


def _waits_of(setup: Setup, loss, compiled):
    training = small_training(setup, LOSSES[loss], compile=compiled)
    for _ in range(2):
        training()
    counted = _gpu_waits if setup.gpu else _cpu_waits
    number = 3
    with counted() as found:
        for _ in range(number):
            training()
    places = "\n".join(f"{times / number:4.1f} x {place}" for place, times in found.most_common())
    name = f"{loss}{', compiled' * compiled}"
    yield at_most(f"{name}: waits a step", sum(found.values()) / number, 0, judged=setup.gpu, details=places)


@contextmanager
def _gpu_waits():
    """Counts torch's warnings of synchronising operations, by file and line; those of all threads."""
    found = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found.update(_place(w.filename, w.lineno) for w in caught if SYNCHRONISED in str(w.message))


@contextmanager
def _cpu_waits():
    with _Waits() as mode:
        yield mode.found


class _Waits(TorchDispatchMode):
    """Counts the operations whose result the host must see, by the line of the package that calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masked = function.overloadpacket is aten.index and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if masked or function.overloadpacket in WAITED_FOR:
            self.found[_calling_line()] += 1
        return function(*args, **(kwargs or {}))


def _calling_line() -> str:
    frame = sys._getframe()
    while frame.f_back is not None and PACKAGE not in frame.f_code.co_filename:
        frame = frame.f_back
    return _place(frame.f_code.co_filename, frame.f_lineno)


def _place(path, line) -> str:
    return f"{'/'.join(Path(path).parts[-2:])}:{line}"


def determinism(setup: Setup):
    """4: the same steps twice, and once through a state dict halfway: the same bits of weights, buffers and centres."""
    yield from each(lambda case: _repeated(setup, *case), _cases(setup))


def _repeated(setup: Setup, loss, compiled):
    torch._dynamo.reset()
    size = setup.size
    reader = Made(8 * size.classes, size.image, size.classes)
    settings = setup.settings(LOSSES[loss], compiled=compiled)

    def begun() -> Training:
        training = Training(settings, reader, size.classes, setup.device)
        training.ready()
        return training

    ends = []
    for _ in range(2):
        training = begun()
        _take(training, size.repeated)
        ends.append(_bits(training))
    first = begun()
    _take(first, size.repeated // 2)
    second = begun()
    second.learner.load_state_dict(first.learner.state_dict())
    for _ in range(first.taken):
        next(second.batches)
    second.taken = first.taken
    _take(second, size.repeated - first.taken)
    name = f"{loss}{', compiled' * compiled}: tensors that differ"
    yield at_most(f"{name} when repeated", _different(ends[0], ends[1]), 0, f"of {len(ends[0])}")
    yield at_most(f"{name} when resumed", _different(ends[0], _bits(second)), 0, f"of {len(ends[0])}")


def _take(training: Training, number) -> list[torch.Tensor]:
    return [training() for _ in range(number)]


def _bits(training: Training) -> dict[str, torch.Tensor]:
    """Weights, running statistics and centres, copied."""
    state = {**training.learner.model.state_dict(), **training.learner.loss.state_dict()}
    return {name: tensor.cpu().clone() for name, tensor in state.items()}


def _different(first, second) -> int:
    return sum(not torch.equal(tensor, second[name]) for name, tensor in first.items())


def readers(setup: Setup):
    """5: each way to read against decoding: bits of all images, and every figure of two epochs."""
    manifest = read_manifest(setup.shards)
    split = Split(setup.shards, manifest, "train")
    ids = np.arange(len(split))
    wanted = torch.from_numpy(split.read(ids))
    rows = {}
    for kind in READERS:
        (reader,) = open_readers([split], kind, str(setup.scratch / "cache"), setup.device, say, say).readers
        different = int((torch.as_tensor(reader.read(ids)).cpu() != wanted).sum())
        yield at_most(f"{kind}: values that differ", different, 0, f"of {wanted.numel():,}")
    for kind in READERS:
        rows[kind] = _rows_of_two_epochs(setup, kind)
    for kind in READERS[:2]:
        different = [name for name, value in rows[kind].items() if value != rows["decode"].get(name)]
        yield at_most(
            f"{kind}: figures that differ", len(different), 0, f"of {len(rows[kind])}", details=", ".join(different)
        )


def _rows_of_two_epochs(setup: Setup, kind) -> dict[str, object]:
    """Every figure of every epoch but the times."""
    data = {"shards": str(setup.shards), "reader": kind, "cache_dir": str(setup.scratch / "cache")}
    runs = setup.scratch / "runs"
    settings = setup.small_settings(LOSSES["ce"], data=data, name=f"read-{kind}", runs_dir=str(runs), epochs=2)
    fit(settings, device=setup.device)
    rows = RunFolder(runs / f"read-{kind}").rows()
    return {f"{row['epoch']}/{name}": row[name] for row in rows for name in row if not name.endswith("_s")}


def ranks(setup: Setup):
    """6: two ranks that share the device against one, over gloo: float64 gradients of a step in two blocks."""
    alone = gradients_of_rank(setup.device.type)
    both = run_ranks(gradients_of_rank, 2, setup.device.type)[-1]
    for loss in SEVERAL_RANKS:
        yield at_most(f"{loss}: gradient", relative(*map(torch.from_numpy, (both[loss], alone[loss]))), 1e-10)


def gradients_of_rank(kind) -> dict[str, np.ndarray]:
    """Of each loss after a step, by this rank or this process alone."""
    device = torch.device(kind, 0) if kind == "cuda" else CPU
    setup = Setup(device, Path(), None, 0.0)
    found = {}
    for loss in SEVERAL_RANKS:
        training = small_training(setup, LOSSES[loss], precision="float64", blocks=2)
        training()
        found[loss] = flat_gradient(training.learner).numpy()
    return found


def trend(setup: Setup):
    """11: the loss of a run as a GPU takes it, bf16 and compiled, against float32 without compiling; same seed."""
    torch._dynamo.reset()
    size = setup.size
    split = Split(setup.shards, read_manifest(setup.shards), "train")
    (reader,) = open_readers([split], "device", str(setup.scratch / "cache"), setup.device, say, say).readers
    last = {}
    for name, compiled, precision in (("bf16, compiled", size.compiled, "auto"), ("float32", False, "float32")):
        values = {"ce": {"label_smoothing": 0.1}, "optimizer": {"lr": 0.05}, "precision": precision}
        settings = setup.settings(LOSSES["ce"], compiled, epochs=max(1, size.trend // 100), **values)
        training = Training(settings, reader, size.classes, setup.device)
        training.ready()
        losses = torch.stack(_take(training, size.trend)).tolist()
        last[name] = float(np.mean(losses[-size.trend // 6 :]))
        yield Row(f"{name}: first loss", losses[0])
        yield Row(f"{name}: mean of the last sixth", last[name])
    fast, exact = last.values()
    yield at_most("relative difference", abs(fast / exact - 1), 0.05)
