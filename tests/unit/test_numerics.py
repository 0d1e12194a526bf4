"""How a device computes: memory formats that CPUs survive, torch's switches, and what is refused."""

import subprocess
import sys

import pytest
import torch
import torchvision
from torch import nn

from dlops_dist.engine.numerics import compiles, memory_format_of, precision_of, set_numerics
from dlops_dist.models.resnet import resnet18
from dlops_dist.recipes.q1 import Settings as Q1

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)
NETWORKS = {
    "ours, 8 wide": (lambda: resnet18(10, width=8), torch.contiguous_format),
    "ours, 15 wide": (lambda: resnet18(10, width=15), torch.contiguous_format),
    "ours, 16 wide": (lambda: resnet18(10, width=16), torch.channels_last),
    "torchvision's": (torchvision.models.resnet18, torch.channels_last),
    "a strided 1x1 on pixels": (lambda: nn.Sequential(nn.Conv2d(3, 64, 1, stride=2)), torch.contiguous_format),
    "strided one way": (lambda: nn.Sequential(nn.Conv2d(3, 64, 1, stride=(1, 2))), torch.contiguous_format),
    "few channels a group": (lambda: nn.Sequential(nn.Conv2d(64, 64, 1, 2, groups=32)), torch.contiguous_format),
    "a strided 3x3 on pixels": (lambda: nn.Sequential(nn.Conv2d(3, 64, 3, stride=2)), torch.channels_last),
    "no convolution": (lambda: nn.Sequential(nn.Linear(3, 4)), torch.channels_last),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_that_a_cpu_would_compute_wrongly_are_not_channels_last(network):
    make, expected = NETWORKS[network]
    assert memory_format_of(make(), CPU) == expected
    assert memory_format_of(make(), GPU) == torch.channels_last


GRADIENTS = """
import torch
from torch import nn
from dlops_dist.engine.numerics import memory_format_of

def gradient(conv, x, dy):
    conv.zero_grad()
    conv(x).backward(dy)
    return conv.weight.grad.double()

torch.manual_seed(0)  # where a gradient of two numbers nearly cancels, rounding alone is more than is allowed
for threads in (1, 2):
    torch.set_num_threads(threads)
    for channels in (1, 3, 7, 8, 9, 12, 15, 16, 17, 24, 64):
        for batch in (32, 33):
            conv = nn.Conv2d(channels, 2 * channels, 1, stride=2, bias=False)
            memory_format = memory_format_of(conv, torch.device("cpu"))
            x = torch.randn(batch, channels, 16, 16, dtype=torch.float64)
            dy = torch.randn(batch, 2 * channels, 8, 8, dtype=torch.float64)
            expected = gradient(conv.double(), x, dy)
            conv, x, dy = (t.float().to(memory_format=memory_format) for t in (conv, x, dy))
            for _ in range(20):
                error = (gradient(conv, x, dy) - expected).norm() / expected.norm()
                around = [torch.randn(n) for n in (7, 100, 1000, 5000)]
                if not error < 1e-6:
                    raise SystemExit(f"{channels} channels, batch {batch}, {threads} threads: {error}")
print("equal")
"""


def test_weights_of_strided_1x1_convolutions_get_their_gradient():
    """Against float64 in NCHW. In a process of its own: where it goes wrong, memory is written over."""
    done = subprocess.run([sys.executable, "-c", GRADIENTS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr[-500:]


STEPS = """
import numpy as np, torch
from dlops_dist.recipes.q1 import Settings as Q1
from dlops_dist.data.loader import Batch
from dlops_dist.engine.learner import Learner
from dlops_dist.engine.samples import Inputs

for width, size, micro in ((8, 64, None), (9, 32, None), (3, 32, None), (8, 64, 7)):
    settings = Q1(model={"width": width, "stem": "imagenet"}, optimizer={"lr": 0.01})
    learner = Learner(settings, Inputs(10, (0.5,) * 3, (0.25,) * 3), 10, torch.device("cpu"))
    labels, ids = torch.arange(33) % 10, torch.arange(33)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (33, size, size, 3), np.uint8))
    parts = [slice(first, first + (micro or 33)) for first in range(0, 33, micro or 33)]
    batches = [
        Batch(images[p], ids[p], labels[p], slice(0, len(labels[p])), labels[p].numpy()) for p in parts
    ]
    losses = [learner.step(batches, 0, step).item() for step in range(4)]
    if not all(map(np.isfinite, losses)):
        raise SystemExit(f"width {width}: {losses}")
print("finite")
"""


@pytest.mark.slow
def test_narrow_networks_survive_odd_batches():
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "finite\n"), done.stderr[-500:]


@pytest.mark.parametrize(
    ("values", "device", "expected"),
    [({}, CPU, False), ({}, GPU, True), ({"smoke": True}, GPU, False), ({"compile": True}, CPU, True),
     ({"compile": False}, GPU, False), ({"compile": True, "smoke": True}, GPU, True)],
)  # fmt: skip
def test_gpus_compile_unless_it_is_a_trial_or_unwanted(values, device, expected):
    assert compiles(Q1(**values), device) == expected


def test_switches_of_a_gpu_are_set_and_deterministic_algorithms_everywhere():
    """Read as torch's own compiler reads them: some names raise once others were written."""
    cudnn, matmul, filled = torch.backends.cudnn, torch.backends.cuda.matmul, torch.utils.deterministic
    before = cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32
    try:
        for deterministic in (True, False):
            set_numerics(Q1(deterministic=deterministic), CPU)
            assert (cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32) == before
            assert torch.are_deterministic_algorithms_enabled() == deterministic
            assert not filled.fill_uninitialized_memory
        for deterministic in (True, False):
            set_numerics(Q1(deterministic=deterministic), GPU)
            assert not torch.backends.cudnn.allow_tf32
            assert not torch.backends.cuda.matmul.allow_tf32
            assert torch.get_float32_matmul_precision() == "highest"
            assert torch.backends.cudnn.benchmark != deterministic
            assert torch.are_deterministic_algorithms_enabled() == deterministic
            assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32 = before
        torch.use_deterministic_algorithms(False)
        filled.fill_uninitialized_memory = True


@pytest.mark.parametrize("name", ["float32", "bf16", "float64"])
def test_a_named_precision_is_the_same_everywhere(name):
    dtype = torch.float64 if name == "float64" else torch.float32
    for device in (CPU, GPU):
        assert precision_of(Q1(precision=name), device) == (dtype, name == "bf16")
