"""Anybody's model made exact: the same function of the global batch for any number of ranks, or refused by name."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dlops_dist.distributed.norm import (
    BlockBatchNorm1d,
    BlockBatchNorm2d,
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    is_exact_norm,
)
from dlops_dist.errors import RunError, UserError

Over = Literal["block", "sync"]
NORMS: dict[type[nn.Module], dict[Over, type[nn.Module]]] = {
    nn.BatchNorm1d: {"block": BlockBatchNorm1d, "sync": SyncBatchNorm1d},
    nn.BatchNorm2d: {"block": BlockBatchNorm2d, "sync": SyncBatchNorm2d},
}
DROPPED = {"Dropout": "value", "Dropout1d": "channel", "Dropout2d": "channel", "StochasticDepth": "sample",
           "DropPath": "sample"}  # fmt: skip
"""Modules that drop, by their classes' names, and what they drop together."""
PROBED = 4
"""Samples of a probe."""


class KeyedDropout(nn.Module):
    """Drops where its number of `draws`, uniform in [0, 1), is below p, in training; the rest grows by 1 / (1 - p).

    The draws of a sample are keyed by (seed, epoch, sample): it is dropped alike in whatever batch it is.
    """

    def __init__(self, p: float, together: str) -> None:
        super().__init__()
        self.p, self.together = p, together
        self.draws: Tensor | None = None
        self.num_draws = 0
        """For each sample."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        shape = {"value": x.shape[1:], "channel": x.shape[1:2], "sample": ()}[self.together]
        if self.draws is None:
            raise RunError("a dropout has no numbers to drop by: a model with dropouts must be an Embedder")
        kept = (self.draws >= self.p).view(len(x), *shape, *[1] * (x.ndim - 1 - len(shape)))
        return x * kept / (1 - self.p)


class Embedder(nn.Module):
    """Any module that gives features (N, D) of images (N, 3, H, W), made exact, under a linear head.

    Args:
        trunk: is changed: its batch norms become ours, its dropouts keyed.
        embedding_dim: D.
        image_size: (height, width) of the images that it is probed with.
        norm: whether batch norms look at each block of a batch, with the same bits for any number of ranks, or at the
            samples of all ranks.

    Raises:
        UserError: names a module that cannot be exact, and why.
    """

    def __init__(
        self, trunk: nn.Module, embedding_dim: int, num_classes: int, image_size: tuple[int, int], norm: Over = "block"
    ) -> None:
        super().__init__()
        self.trunk = exact(trunk, torch.rand(PROBED, 3, *image_size, dtype=torch.float64), embedding_dim, norm)
        self.embedding_dim, self.fc = embedding_dim, nn.Linear(embedding_dim, num_classes)
        self._dropouts = [module for module in self.trunk.modules() if isinstance(module, KeyedDropout)]

    @property
    def num_draws(self) -> int:
        """Uniform numbers that `embed` takes for each sample in training."""
        return sum(module.num_draws for module in self._dropouts)

    def embed(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """Embeddings (N, D); in training units are dropped by the draws (N, num_draws)."""
        sizes = [module.num_draws for module in self._dropouts]
        parts = [None] * len(sizes) if draws is None else draws.split(sizes, dim=1)
        for module, part in zip(self._dropouts, parts, strict=True):
            module.draws = part
        return self.trunk(images)  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        return self.fc(self.embed(images))  # type: ignore[no-any-return]


def exact(model: nn.Module, images: Tensor, num_features: int, norm: Over = "block") -> nn.Module:
    """A model whose batch norms look at blocks, or at all ranks' samples, and whose dropouts are keyed; it is probed.

    Raises:
        UserError: with the same images, its outputs change with torch's random state, or with what else is in the
            batch; or a buffer changes that no norm of ours keeps (within `inexact_allowed` these are noted instead);
            or its outputs are not (N, num_features).
    """
    model = _replaced(model, _keyed)
    found = list(_probed(model, images, num_features))
    notes = _noted.get()
    if found and notes is None:
        raise UserError(f"{found[0]}; or train it by --inexact")
    if notes is not None:
        notes += found
    return _replaced(model, partial(_made_exact, over=norm))


_noted: ContextVar[list[str] | None] = ContextVar("noted", default=None)


@contextmanager
def inexact_allowed(allowed: bool) -> Iterator[list[str]]:
    """Within it, where it is allowed, models that cannot be exact are not refused; yields the notes of why not."""
    notes: list[str] = []
    token = _noted.set(notes if allowed else None)
    try:
        yield notes
    finally:
        _noted.reset(token)


def whatever_is_inexact(model: Any, images: Tensor) -> list[str]:
    """What makes a run's model depend on how samples are shared among ranks; of an `exact` one nothing.

    Args:
        model: has `embed`, a head `fc` and `embedding_dim`.
        images: normalised.
    """
    found = [
        f"the model's module {name} is a batch norm over each rank's own samples; exact(model) makes it one over blocks"
        for name, module in model.named_modules()
        if type(module) in NORMS
    ]
    return [*found, *_probed(_Outputs(model), images[:PROBED], model.embedding_dim + model.fc.out_features)]


class _Outputs(nn.Module):
    """A model's embeddings and logits, side by side, as its forward pass."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        embeddings = self.model.embed(images)
        return torch.cat([embeddings, self.model.fc(embeddings)], dim=1)


def _replaced(model: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """The model with other modules in the places of some; what stood in two places does so again."""
    new = {module: replacement(module) or module for module in model.modules()}
    for module in new.values():
        for name, child in list(module._modules.items()):
            if child in new:
                module._modules[name] = new[child]
    return new[model]


def _keyed(module: nn.Module) -> nn.Module | None:
    together = DROPPED.get(type(module).__name__)
    if together is None:
        return None
    p = getattr(module, "p", getattr(module, "drop_prob", None)) or 0.0
    if together == "sample" and not (
        getattr(module, "mode", "row") == "row" and getattr(module, "scale_by_keep", True)
    ):
        return None
    return KeyedDropout(float(p), together)


def _made_exact(module: nn.Module, over: Over) -> nn.Module | None:
    if type(module) not in NORMS:
        return None
    old: Any = module
    new: Any = NORMS[type(module)][over](old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
    new.load_state_dict(old.state_dict())
    for parameter, like in zip(new.parameters(), old.parameters(), strict=True):
        parameter.requires_grad_(like.requires_grad)
    return new.to(next(old.parameters(), torch.empty(0)).device).train(old.training)  # type: ignore[no-any-return]


def _probed(model: nn.Module, images: Tensor, num_features: int) -> Iterator[str]:
    """What is inexact. In float64, on a copy: what differs then differs by more than rounding."""
    copied = copy.deepcopy(model).double().train()
    for module in copied.modules():
        if type(module) in NORMS or is_exact_norm(module) or isinstance(module, KeyedDropout):
            module.eval()  # what these do is known
    before = {name: buffer.clone() for name, buffer in copied.named_buffers()}
    first = _outputs(copied, images, 0)
    shape = tuple(first[-1][1].shape)
    if shape != (len(images), num_features):
        raise UserError(f"the model gives {shape} of {tuple(images.shape)} images, not ({len(images)}, {num_features})")
    changed = [name for name, buffer in copied.named_buffers() if not torch.equal(buffer, before[name])]
    if changed:
        yield (
            f"the model's buffer {changed[0]} changes in training: ranks would keep others; use a batch norm of "
            f"torch, or keep no such state"
        )
    yield from _compared(
        first, _outputs(copied, images, 1), slice(None), "changes with torch's random state; use nn.Dropout"
    )
    half = len(images) // 2
    others = torch.cat([images[:half], images[half:].flip(3) * 0.5])
    yield from _compared(
        first, _outputs(copied, others, 0), slice(0, half),
        "depends on which other samples are in the batch; use a norm of torch, or one over each sample alone",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        total = copied(images).sum()
    if total.requires_grad:
        total.backward()
    unused = [name for name, p in copied.named_parameters() if p.requires_grad and p.grad is None]
    if unused:
        yield f"the model's weights {unused[0]} get no gradient: leave out what is not used, or do not train it"
    for kept, probed in zip(_dropouts(model), _dropouts(copied), strict=True):
        kept.num_draws = probed.num_draws


def _dropouts(model: nn.Module) -> Iterator[KeyedDropout]:
    return (module for module in model.modules() if isinstance(module, KeyedDropout))


@torch.no_grad()
def _outputs(model: nn.Module, images: Tensor, seed: int) -> list[tuple[str, Tensor]]:
    """(name, output) of each module that gives a tensor, in the order of their ends; the model itself comes last."""
    found: list[tuple[str, Tensor]] = []
    hooks = []
    for name, module in model.named_modules():

        def hook(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            if isinstance(output, Tensor):
                found.append((name, output.clone()))
            if isinstance(module, KeyedDropout):
                if name in [other for other, _ in found[:-1]]:
                    raise UserError(f"the model's module {name} drops twice in a pass; give each place its own")
                numbers = {"value": output[0].numel(), "channel": output[0].shape[0], "sample": 1}
                module.num_draws = numbers[module.together]

        hooks.append(module.register_forward_hook(hook))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            output = model(images)
    finally:
        for handle in hooks:
            handle.remove()
    if not isinstance(output, Tensor):
        raise UserError(f"the model must give a tensor (N, D) of images, not a {type(output).__name__}")
    return found


def _compared(a: list[tuple[str, Tensor]], b: list[tuple[str, Tensor]], rows: slice, what: str) -> Iterator[str]:
    def differs(pair: tuple[tuple[str, Tensor], tuple[str, Tensor]]) -> bool:
        ours, theirs = pair[0][1], pair[1][1]
        return not torch.allclose(ours[rows], theirs[rows], rtol=1e-9, atol=1e-12, equal_nan=True)

    pairs = list(zip(a, b, strict=True))
    if differs(pairs[-1]):  # what is inside may lie in another order than samples do
        name = next(filter(differs, pairs))[0][0]
        yield f"the model's module {name or 'at the top'} {what}"
