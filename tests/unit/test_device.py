"""Which device a worker takes, and what is said where it cannot be used or is full."""

import warnings

import pytest
import torch

from dlops_dist.engine.device import default_device, memory_errors_explained, use
from dlops_dist.errors import RunError

ADVICE = "pass a lower --micro-batch-size"
CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)
TOO_OLD = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 12020). Please update your GPU "
    "driver by downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)
FULL = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 1 has a total capacity of 79.11 GiB of which 1.02 GiB is "
    "free. Process 7 has 78.08 GiB memory in use. Of the allocated memory 70.00 GiB is allocated by PyTorch."
)


@pytest.mark.parametrize(
    ("local_rank", "visible", "index"), [(None, 4, 0), ("", 4, 0), ("0", 4, 0), ("3", 4, 3), ("5", 1, 0)]
)
def test_a_worker_takes_the_gpu_of_its_local_rank(local_rank, visible, index, monkeypatch):
    """Where it sees one GPU alone, that is its own."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert default_device() == torch.device("cuda", index)


@pytest.mark.parametrize("local_rank", ["4", "x"])
def test_more_processes_than_gpus_are_refused(local_rank, monkeypatch, user_error):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with user_error(f"LOCAL_RANK={local_rank}", 4):
        default_device()


def test_a_gpu_without_a_number_is_the_current_one():
    use(torch.device("cuda"))


def test_what_else_torch_says_of_a_gpu_is_still_said(monkeypatch):
    def unknown() -> bool:
        warnings.warn("CUDA initialization: CUDA unknown error", stacklevel=1)
        return False

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", unknown)
    with pytest.warns(UserWarning, match="CUDA unknown error"):
        assert default_device() == CPU


def test_without_a_gpu_it_is_the_cpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_device() == CPU


def warns_of_the_driver() -> bool:
    warnings.warn(TOO_OLD, stacklevel=1)
    return False


def test_a_driver_that_is_too_old_is_one_line_and_no_silent_run_on_the_cpu(monkeypatch, user_error):
    monkeypatch.setattr(torch.cuda, "is_available", warns_of_the_driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with user_error("driver", "(found version 12020)", torch.__version__, "CUDA_VISIBLE_DEVICES="):
        default_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert default_device() == CPU


def test_a_driver_that_is_too_old_is_one_line_where_somebody_else_chose_the_device(monkeypatch, user_error):
    def set_device(_: torch.device) -> None:
        raise RuntimeError(TOO_OLD.removeprefix("CUDA initialization: ") + "\nAlternatively, ...")

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    with user_error("driver", "(found version 12020)"):
        use(GPU)


@pytest.mark.parametrize(
    ("error", "device", "shown"),
    [
        (torch.OutOfMemoryError(FULL), GPU,
         ["cuda:1 is out of memory", "tried to allocate 20.00 GiB", "of which 1.02 GiB is free"]),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), GPU,
         ["cuda:1 is out of memory"]),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), GPU,
         ["cuda:1 is out of memory"]),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: can't allocate memory: you tried "
                      "to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"), CPU,
         ["cpu is out of memory", "you tried to allocate 4000000000000 bytes"]),
        (MemoryError("Unable to allocate 64.0 GiB for an array"), CPU, ["unable to allocate 64.0 GiB"]),
    ],
    ids=["torch's allocator", "the driver", "a library", "a CPU", "numpy"],
)  # fmt: skip
def test_a_full_device_is_one_line_that_says_what_lowers_it(error, device, shown):
    with pytest.raises(RunError) as caught, memory_errors_explained(device, ADVICE):
        raise error
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in [*shown, ADVICE]:
        assert part in message


def test_a_real_allocation_that_fails_is_one_line():
    expected = r"cpu is out of memory: you tried to allocate \d+ bytes"
    with pytest.raises(RunError, match=expected), memory_errors_explained(CPU, ADVICE):
        torch.empty(2**46, dtype=torch.float64)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="a shape"), memory_errors_explained(GPU, ADVICE):
        raise RuntimeError("a shape")
