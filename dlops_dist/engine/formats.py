"""A trained model as a file that needs nothing of this package: how it is written, read again, and compared."""

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dlops_dist.engine.learner import Network
from dlops_dist.engine.result import Predictor

OUTPUTS = ("logits", "embeddings")
SIZES = (1, 3, 8)
"""Of the batches that a file is tried on."""
ROUNDINGS = 16
"""A file may differ by so many times what the model itself rounds: it adds in another order, with norms folded into
weights. Twice was seen; wrong weights, statistics or pixels differ by a thousand times."""


class Exported(nn.Module):
    """Logits (N, C) and embeddings (N, D) of uint8 images (N, H, W, 3), as they are evaluated, in float32."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        learner = predictor.learner
        self.network = copy.deepcopy(Network(learner.network.normalize, predictor.model, detach_head=False))
        self.flip_test = learner.settings.flip_test
        self.float().to(memory_format=torch.contiguous_format).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        embeddings, logits = self.network(images)
        if self.flip_test:
            mirrored = self.network(images.flip(2))
            embeddings, logits = (embeddings + mirrored[0]) / 2, (logits + mirrored[1]) / 2
        return logits, embeddings


Function = Callable[[Tensor], Sequence[Tensor]]


class Format(NamedTuple):
    """A kind of file."""

    suffix: str
    write: Callable[[Exported, Tensor, dict[str, str]], bytes]
    """The file of a model, given some images and texts to keep beside it."""
    read: Callable[[bytes, Exported], Function]
    """What a file computes; of mere weights, in a copy of the model."""


def _write_onnx(network: Exported, images: Tensor, texts: dict[str, str]) -> bytes:
    program: Any = torch.onnx.export(
        _traced(network, images), dynamo=True, verbose=False, input_names=["images"], output_names=OUTPUTS
    )
    program.model.metadata_props.update(texts)
    return program.model_proto.SerializeToString()  # type: ignore[no-any-return]


def _read_onnx(content: bytes, _: Exported) -> Function:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(found) for found in session.run(None, {"images": images.numpy()})]


def _write_torch_export(network: Exported, images: Tensor, texts: dict[str, str]) -> bytes:
    file = io.BytesIO()
    torch.export.save(_traced(network, images), file, extra_files=texts)
    return file.getvalue()


def _read_torch_export(content: bytes, _: Exported) -> Function:
    return torch.export.load(io.BytesIO(content)).module()


@torch.no_grad()
def _traced(network: Exported, images: Tensor) -> torch.export.ExportedProgram:
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _write_safetensors(network: Exported, _: Tensor, texts: dict[str, str]) -> bytes:
    from safetensors.torch import save

    state = network.network.model.state_dict()
    return save({name: value.clone() for name, value in state.items()}, texts)  # some may share their memory


def _read_safetensors(content: bytes, network: Exported) -> Function:
    from safetensors.torch import load

    again = copy.deepcopy(network)
    again.network.model.load_state_dict(load(content))
    return again


FORMATS = {
    "onnx": Format("onnx", _write_onnx, _read_onnx),
    "torch-export": Format("pt2", _write_torch_export, _read_torch_export),
    "safetensors": Format("safetensors", _write_safetensors, _read_safetensors),
}


class Difference(NamedTuple):
    """Of one output, over all batches."""

    found: float
    """The largest from the model's."""
    bound: float
    """What rounding explains."""


@torch.no_grad()
def differences(function: Function, network: Exported, images: Tensor) -> dict[str, Difference]:
    """How far a file's outputs are from the model's on images (12, H, W, 3), and how far rounding may bring them.

    bound = 16 max(max |y - y64|, 2^-23 max |y|),    y64 the model's outputs in float64
    """
    batches = images.split(SIZES)
    wide = copy.deepcopy(network).double()
    theirs, ours, exact = (
        [torch.cat(parts).double() for parts in zip(*map(compute, batches), strict=True)]
        for compute in (function, network, wide)
    )
    found = {}
    for name, a, b, c in zip(OUTPUTS, theirs, ours, exact, strict=True):
        rounding = max((b - c).abs().max().item(), torch.finfo(torch.float32).eps * b.abs().max().item())
        found[name] = Difference((a - b).abs().max().item(), ROUNDINGS * rounding)
    return found
