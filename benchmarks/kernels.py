"""P19: how many kernels a step launches, in compiled graphs and besides them, counted without a GPU.

    python benchmarks/kernels.py [--classes 200] [--batch 16]

Counts the operations that compute something (views and empty tensors do not) while a step runs on the CPU by what a
GPU would run. Those of a compiled graph become a few fused kernels; each of the others is at least one of its own.
The bare loop is torchvision's resnet18, torch's cross-entropy and fused SGD, its network compiled.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torchvision
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dlops_dist.data.loader import Batch
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.samples import Inputs
from dlops_dist.losses import mining, triplet
from dlops_dist.recipes.q1 import Settings as Q1

LOSSES = {
    "ce": {},
    "center": {"loss": "center"},
    "batch-hard": {"loss": "triplet"},
    "semi-hard": {"loss": "triplet", "triplet": {"mining": "semi-hard"}},
    "all": {"loss": "triplet", "triplet": {"mining": "all"}},
}
NOTHING = {
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
}


class Count(NamedTuple):
    """Operations of a step."""

    compiled: int
    eager: int


class Operations(TorchDispatchMode):
    """Counts operations that launch kernels, those inside compiled graphs apart."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled code runs under it

    def __init__(self) -> None:
        super().__init__()
        self.inside = False
        self.names: dict[bool, list[str]] = {True: [], False: []}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not (is_view or name in NOTHING or name.startswith("profiler::")):
            self.names[self.inside].append(name)
        return func(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    print("operations of a step       compiled  eager")
    for name in LOSSES:
        print("{:<26} {:>8} {:>6}".format(f"ours, {name}", *counted(partial(our_step, name), arguments)))
    print("{:<26} {:>8} {:>6}".format("bare torchvision loop", *counted(bare_step, arguments)))


def counted(make_step: Callable[[argparse.Namespace], Callable[[], object]], arguments: argparse.Namespace) -> Count:
    """Of the third step: the first ones compile."""
    operations = names_of(make_step, arguments)
    return Count(len(operations[True]), len(operations[False]))


def names_of(make_step, arguments) -> dict[bool, list[str]]:
    """{inside compiled graphs: names of operations}"""
    operations = Operations()

    def compiler(graph, _):
        boxed = make_boxed_func(graph.forward)

        def run(args):
            operations.inside = True
            try:
                return boxed(args)
            finally:
                operations.inside = False

        run._boxed_call = True
        return run

    torch._dynamo.reset()
    watched_compile = partial(
        torch.compile, backend=aot_autograd(fw_compiler=compiler, keep_inference_input_mutations=True)
    )
    with (
        mock.patch("torch.compile", watched_compile),
        mock.patch.object(mining, "on_gpu", lambda x: True),
        mock.patch.object(triplet, "on_gpu", lambda x: True),
    ):
        step = make_step(arguments)
        step()
        step()
        with operations:
            step()
    return operations.names


def our_step(loss: str, arguments: argparse.Namespace) -> Callable[[], object]:
    settings = Q1(compile=True, model={"width": 16}, global_batch_size=arguments.batch, **LOSSES[loss])
    learner = Learner(settings, Inputs(arguments.classes, (0.5,) * 3, (0.25,) * 3), 100, torch.device("cpu"))
    labels = torch.arange(arguments.batch) // 4
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (len(labels), 32, 32, 3), np.uint8))
    batch = Batch(images, torch.arange(len(labels)), labels, slice(0, len(labels)), labels.numpy())
    return partial(learner.step, [batch], 0, 0)


def bare_step(arguments: argparse.Namespace) -> Callable[[], object]:
    model = torchvision.models.resnet18(num_classes=arguments.classes)
    compiled = torch.compile(model, dynamic=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    images, labels = torch.randn(arguments.batch, 3, 32, 32), torch.arange(arguments.batch)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(compiled(images), labels).backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
