"""Runs code on tensors that say they are on a GPU and hold nothing, and tells what a real GPU would wait for.

Of a backward pass nothing is run: torch's engine asks for a driver. Gradients are zeros; what a custom function's own
`backward` does is run on CPUs elsewhere.
"""

from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda:0")
WAITING = {
    "_local_scalar_dense", "nonzero", "unique_dim", "_unique2", "unique_consecutive", "masked_select", "bincount",
    "repeat_interleave", "equal", "is_nonzero",
}  # fmt: skip
"""Operations for which the host waits."""


class Waits(TorchDispatchMode):
    """Collects the names of operations that make the host wait for a GPU, or a GPU for the host."""

    def __init__(self):
        super().__init__()
        self.found, self.num_operations = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.num_operations += 1
        name = func._schema.name.removeprefix("aten::")
        if name.rstrip("_") in WAITING or self._by_mask(name, args) or self._blocks(name, args, kwargs):
            self.found.append(name)
        return func(*args, **kwargs)

    @staticmethod
    def _by_mask(name, args):
        """Whether rows are chosen by a mask, which are counted first."""
        chosen = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in chosen)

    @staticmethod
    def _blocks(name, args, kwargs):
        """Whether something is copied between host and device, and waited for."""
        if name == "lift_fresh":  # torch.tensor(list, device=...)
            return args[0].device.type != "cpu"
        if name == "_to_copy":
            to = torch.device(kwargs.get("device") or args[0].device)
            return to.type != args[0].device.type and not kwargs.get("non_blocking")
        if name in ("copy_", "copy"):
            return args[0].device.type != args[1].device.type and not (len(args) > 2 and args[2])
        return False


@contextmanager
def fake_gpu(monkeypatch):
    """Within it, tensors of cuda:0 can be made. Modules move there, and whoever asks for gradients gets zeros."""

    kept = []  # fake tensors whose last name goes away while they are looked at crash

    def apply(module, function, recurse=True):
        for part in module.modules():
            for name, parameter in list(part._parameters.items()):
                if parameter is not None:
                    kept.append(parameter)
                    moved = function(parameter.detach())
                    part._parameters[name] = torch.nn.Parameter(moved, requires_grad=parameter.requires_grad)
            for name, buffer in list(part._buffers.items()):
                if buffer is not None:
                    kept.append(buffer)
                    part._buffers[name] = function(buffer)
        return module

    def copied(tensor, memo):
        memo[id(tensor)] = copy = tensor.detach().clone()
        parameter = isinstance(tensor, torch.nn.Parameter)
        return torch.nn.Parameter(copy, requires_grad=tensor.requires_grad) if parameter else copy

    def grad(outputs, inputs, *_, **__):
        return tuple(torch.zeros_like(x) for x in ([inputs] if isinstance(inputs, torch.Tensor) else inputs))

    monkeypatch.setattr(torch.nn.Module, "_apply", apply)  # torch's own swaps tensors, which fake ones refuse
    monkeypatch.setattr(torch.autograd, "grad", grad)
    monkeypatch.setattr(torch.autograd, "backward", lambda tensors, gradients: None)
    monkeypatch.setattr(torch.Tensor, "__deepcopy__", copied)  # torch's own looks at the data of fake ones
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
