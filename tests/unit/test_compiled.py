"""A compiled run computes what a plain one does, and compiles once for all steps, epochs and blocks."""

from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch

from dlops_dist.data.loader import read_ahead
from dlops_dist.engine.evaluation import evaluate
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.samples import Inputs
from dlops_dist.recipes.q1 import Settings as Q1

CPU = torch.device("cpu")
RUNS = {
    "triplet": {"loss": "triplet", "triplet": {"ce_weight": 0.5}, "ema_decay": 0.9, "flip_test": True},
    "center": {"loss": "center", "ce": {"label_smoothing": 0.1}, "augment": {"cutout": 4}},
}


class Images:
    """Random images in memory."""

    in_memory = True

    def __init__(self, number: int) -> None:
        self.pixels = np.random.default_rng(number).integers(0, 256, (number, 16, 16, 3), np.uint8)
        self.labels = np.arange(number) % 10

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, ids: np.ndarray) -> np.ndarray:
        return self.pixels[ids]


def trained_and_evaluated(run, compiled):
    """Two epochs of two steps, each evaluated on a whole block and a short one."""
    values = {"precision": "float64", "model": {"width": 8}, "optimizer": {"lr": 0.01}, **RUNS[run]}
    learner = Learner(Q1(compile=compiled, **values), Inputs(10, (0.5,) * 3, (0.25,) * 3), 2, CPU)
    train, test = Images(32), Images(300)
    found = []
    for epoch in range(2):
        parts = [(np.arange(first, first + 16), slice(0, 16)) for first in (0, 16)]
        for step, batch in enumerate(read_ahead(train, parts, CPU, 1, 1)):
            found.append(learner.step([batch], epoch, 2 * epoch + step).item())
        found += [*learner.end_epoch().values()]
        found += [v for v in evaluate(learner, test, np.arange(300)).values() if isinstance(v, float)]
    return found


@pytest.fixture(scope="module", params=["triplet", pytest.param("center", marks=pytest.mark.slow)])
def runs(request):
    """The figures of a plain run and of two compiled ones; the graphs that were handed to the backend after each."""
    graphs, figures, numbers = [], [], []

    def backend(graph, _):
        graphs.append(graph)
        return graph  # run as it is

    torch._dynamo.reset()
    with mock.patch.object(torch, "compile", partial(torch.compile, backend=backend)):
        for compiled in (False, True, True):
            figures.append(trained_and_evaluated(request.param, compiled))
            numbers.append(len(graphs))
    return figures, numbers, graphs


def test_a_compiled_run_is_a_plain_one_and_compiles_once(runs):
    (plain, first, second), numbers, _ = runs
    assert first == pytest.approx(plain, rel=1e-9)
    assert second == pytest.approx(plain, rel=1e-9)
    training, evaluation = 4, 1  # the network, the losses, the counting, the changes of images; the network
    assert numbers == [0, training + evaluation, training + evaluation], "another stage or fold takes what is there"


def too_wide_for_triton(graph: torch.fx.GraphModule) -> list[str]:
    """Numbers beyond 32 bits that a graph combines with what no input has part in, as with an arange.

    Such counting is folded into an expression of the kernel's 32-bit index, which Triton refuses to compile.
    """
    of_inputs, found = set(), []
    for node in graph.graph.nodes:
        depends = node.op == "placeholder" or any(argument in of_inputs for argument in node.all_input_nodes)
        if depends:
            of_inputs.add(node)
        elif node.all_input_nodes and any(type(a) is int and not -(2**31) <= a < 2**31 for a in node.args):
            found.append(node.format_node())
    return found


def test_compiled_arithmetic_of_64_bits_begins_at_an_input(runs):
    _, _, graphs = runs
    assert [line for graph in graphs for line in too_wide_for_triton(graph)] == []
