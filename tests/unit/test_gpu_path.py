"""What a GPU would run, without one: where each tensor is, what is waited for, how many kernels are launched."""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fake_gpu import GPU, Waits, fake_gpu
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.testing._internal.distributed.fake_pg import FakeStore

from dlops_dist.data.loader import read_ahead
from dlops_dist.data.readers import DeviceReader, Joined
from dlops_dist.engine.evaluation import device_sums
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.samples import Inputs
from dlops_dist.engine.step_log import StepLog
from dlops_dist.losses import TripletLoss
from dlops_dist.recipes.q1 import Settings as Q1
from dlops_dist.recipes.q2 import Settings as Q2
from dlops_dist.recipes.stacked.codes import CodeReader, Codes
from dlops_dist.recipes.stacked.reconstruction import ReconstructionLearner
from dlops_dist.recipes.stacked.stages import build_stack, classifier

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import kernels

INPUTS = Inputs(10, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), (32, 32))
AUGMENT = {"resized_crop": 0.4, "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "cutout": 8}
RUNS = {
    "ce": {"ema_decay": 0.9, "flip_test": True, "optimizer": {"clip_norm": 1.0}},
    "ce, all changes": {"augment": AUGMENT},
    "batch-hard": {"loss": "triplet"},
    "semi-hard": {"loss": "triplet", "triplet": {"mining": "semi-hard", "average": "active", "ce_weight": 1.0}},
    "all": {"loss": "triplet", "triplet": {"mining": "all"}},
    "batch-hard, micro-batches": {"loss": "triplet", "micro_batch_size": 8},
    "center": {"loss": "center"},
    "center, micro-batches": {"loss": "center", "micro_batch_size": 6},
}


class Images:
    """Images of one colour each, on the host."""

    in_memory = False

    def __init__(self, number: int = 40) -> None:
        self.labels = np.arange(number) % 10

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, ids: np.ndarray) -> np.ndarray:
        return np.broadcast_to(ids.astype(np.uint8)[:, None, None, None], (len(ids), 32, 32, 3)).copy()


def settings_of(run: str, norm: str = "sync") -> Q1:
    model = {"width": 16, "stem": "imagenet", "norm": norm}
    values = {"compile": False, "precision": "float32", "model": model, **RUNS[run]}
    return Q1(**values)


def parts_of(size: int | None, number: int = 16):
    """One step's micro-batches, as `read_ahead` takes them."""
    size = size or number
    ids = np.arange(number)
    return [(ids[first : first + size], slice(0, len(ids[first : first + size]))) for first in range(0, number, size)]


def readers():
    on_gpu = DeviceReader(Images(), GPU)
    return {"from the host": Images(), "device": on_gpu, "joined": Joined([on_gpu, DeviceReader(Images(7), GPU)])}


@pytest.mark.parametrize("reader", ["from the host", "device", "joined"])
def test_batches_reach_a_gpu_without_a_wait(reader, monkeypatch):
    with fake_gpu(monkeypatch):
        source = readers()[reader]
        with Waits() as waits:
            (batch,) = read_ahead(source, parts_of(None), GPU, 1, 1)
        assert {tensor.device for tensor in batch[:3]} == {GPU}
        assert batch.images.shape == (16, 32, 32, 3)
        assert TripletLoss().hints(batch.host_labels) == {"largest_class": 2}
    assert waits.found == []


@pytest.mark.parametrize("run", RUNS)
def test_a_step_stays_on_the_gpu_and_waits_for_nothing(run, monkeypatch):
    settings = settings_of(run)
    with fake_gpu(monkeypatch):
        learner = Learner(settings, INPUTS, 10, GPU)
        batches = list(read_ahead(DeviceReader(Images(), GPU), parts_of(settings.micro_batch_size), GPU, 1, 1))
        learner.step(batches, 0, 0)  # an epoch's first step brings its keys
        with Waits() as waits:
            value = learner.step(batches, 0, 1)
        assert value.device == GPU
        assert {tensor.device for tensor in learner.equal_on_all_ranks().values()} == {GPU}
    assert waits.found == []
    assert waits.num_operations > 200


@pytest.mark.parametrize("run", RUNS)
def test_figures_of_a_step_that_is_logged_stay_on_the_gpu_until_the_loss_is_looked_at(run, monkeypatch):
    settings = settings_of(run)
    log = StepLog(1, 16, GPU)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    with fake_gpu(monkeypatch):
        learner = Learner(settings, INPUTS, 10, GPU)
        batches = list(read_ahead(DeviceReader(Images(), GPU), parts_of(settings.micro_batch_size), GPU, 1, 1))
        learner.step(batches, 0, 0)
        with Waits() as waits:
            figures = log.place(1)
            loss = learner.step(batches, 0, 1, figures)
            log.add({"step": 1}, {"loss": loss, **figures})
        figures.pop("gradient_norm")  # of gradients, which nothing fake has
        with Waits() as looks, pytest.raises(DataDependentOutputException):
            log.fetch(loss)
    kind = settings.loss
    assert figures.keys() == {"triplet": {"active_triplets"}, "center": {"center_spread"}, "ce": set()}[kind]
    assert {value.device for value in figures.values()} <= {GPU}
    assert waits.found == []
    assert len(looks.found) <= 2, "once for all of them"


@pytest.fixture
def two_ranks(monkeypatch):
    """This process is one of two, whose exchanges do nothing."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    monkeypatch.setattr(dist, "broadcast", lambda tensor, source: None)  # it asks for a driver
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("run", RUNS)
def test_one_of_two_ranks_waits_for_nothing(run, two_ranks, monkeypatch):
    settings = settings_of(run, norm="local")  # the statistics of others cannot be faked
    with fake_gpu(monkeypatch):
        learner = Learner(settings, INPUTS, 10, GPU)
        parts = [(ids, slice(0, len(ids) // 2)) for ids, _ in parts_of(settings.micro_batch_size)]
        batches = list(read_ahead(DeviceReader(Images(), GPU), parts, GPU, 1, 1))
        learner.step(batches, 0, 0)
        with Waits() as waits:
            learner.step(batches, 0, 1)
    assert waits.found == []


@pytest.mark.parametrize("run", RUNS)
def test_evaluation_stays_on_the_gpu_and_waits_for_nothing(run, monkeypatch):
    with fake_gpu(monkeypatch):
        learner = Learner(settings_of(run), INPUTS, 10, GPU)
        source = DeviceReader(Images(300), GPU)
        with Waits() as waits:
            sums = device_sums(learner, source, np.arange(300))
        assert {x.device for x in sums} == {GPU}
    assert waits.found == []


@pytest.mark.parametrize("layer", [0, 1, None])
@pytest.mark.parametrize("corruption", ["none", "masking", "gaussian"])
def test_pretraining_stays_on_the_gpu_and_waits_for_nothing(layer, corruption, monkeypatch):
    settings = Q2(
        compile=False, precision="float32", model={"layers": (24, 16), "code_layer": 16},
        pretrain={"corruption": corruption, "joint_epochs": 1},
    )  # fmt: skip
    with fake_gpu(monkeypatch):
        source = DeviceReader(Images(300), GPU)
        stack = build_stack(settings, INPUTS).to(GPU)
        codes = Codes(settings, INPUTS, stack, {"train": source}, GPU, lambda text: None)
        learner = ReconstructionLearner(settings, INPUTS, stack, codes, layer, 10, GPU)
        kept = codes.at(layer or 0)["train"]
        (batch,) = read_ahead(kept, parts_of(None), GPU, 1, 1)
        learner.step([batch], 0, 0)
        with Waits() as waits:
            (batch,) = read_ahead(kept, parts_of(None), GPU, 1, 1)
            assert learner.step([batch], 0, 1).device == GPU
        with Waits() as looks, pytest.raises(DataDependentOutputException):
            learner.error(kept, np.arange(300))
        assert isinstance(kept, CodeReader) == bool(layer)
        assert batch.images.device == GPU
    assert waits.found == []
    assert looks.found == ["_to_copy", "_local_scalar_dense"]  # once, at the sums of all blocks


@pytest.mark.parametrize("finetune", [False, True])
def test_the_stacked_classifier_stays_on_the_gpu_and_waits_for_nothing(finetune, monkeypatch):
    settings = Q2(
        compile=False, precision="float32", finetune=finetune,
        model={"layers": (24, 16), "code_layer": 16, "dropout": 0.3, "norm": "batch"},
    )  # fmt: skip
    with fake_gpu(monkeypatch):
        stack = build_stack(settings, INPUTS).to(GPU)
        learner = Learner(settings, INPUTS, 10, GPU, classifier(settings, INPUTS, stack))
        source = DeviceReader(Images(), GPU)
        batches = list(read_ahead(source, parts_of(None), GPU, 1, 1))
        learner.step(batches, 0, 0)
        with Waits() as waits:
            assert learner.step(batches, 0, 1).device == GPU
            device_sums(learner, source, np.arange(40))
    assert waits.found == []


EAGER = {"ce": 16, "center": 38, "batch-hard": 158, "semi-hard": 137, "all": 135}
"""Operations of a step outside of compiled graphs: each is a kernel of its own at least."""


@pytest.mark.parametrize(
    "loss", ["center", "batch-hard", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ce", "semi-hard", "all"))]
)
def test_a_step_launches_as_few_kernels_besides_its_compiled_graphs(loss):
    count = kernels.counted(partial(kernels.our_step, loss), SimpleNamespace(classes=20, batch=16))
    assert count.eager == EAGER[loss]
    assert count.compiled > 218  # operations of the bare torchvision loop's graphs


def test_what_makes_a_gpu_wait_is_found(monkeypatch):
    """The test above cannot pass for want of eyes."""
    waiting = {
        "item": lambda x: x.sum().item(), "mask": lambda x: x[x > 0], "nonzero": lambda x: x.nonzero(),
        "unique": lambda x: x.long().unique(), "list": lambda x: x + torch.tensor([1.0], device=GPU),
        "masked_select": lambda x: x.masked_select(x > 0), "to the host": lambda x: x.cpu(),
        "from the host": lambda x: x.copy_(torch.zeros(3)), "bincount": lambda x: x.long().bincount(),
    }  # fmt: skip
    for name, function in waiting.items():
        with monkeypatch.context() as patch, fake_gpu(patch), Waits() as waits:
            x = torch.zeros(3, device=GPU)
            try:
                function(x)
            except Exception as error:  # of fake tensors, which hold no data to look at
                assert "Data" in type(error).__name__ or "Dynamic" in type(error).__name__, name
        assert waits.found, name
    with fake_gpu(monkeypatch), pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(3, device=GPU) + torch.zeros(3)
