"""Several blocks at once on one rank: threads that each pass them through a copy of the network."""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dlops_dist.config import Run
from dlops_dist.distributed.norm import block_norms
from dlops_dist.engine.numerics import compiled

Item = TypeVar("Item")
Result = TypeVar("Result")


class Lane(NamedTuple):
    """A network, perhaps compiled, and what its block norms leave of a pass."""

    module: nn.Module
    network: Any
    statistics: list[Tensor]


class Lanes:
    """Copies of a network that share its weights, but nothing that a pass writes down; the first is the network itself.

    Args:
        number: of the copies, which are made when they are wanted; several compute in a thread each, a block by
            `threads_per_block` of torch's threads.
        frozen: parts of the network that stay in evaluation mode.
    """

    def __init__(
        self, network: nn.Module, number: int, settings: Run, device: torch.device, frozen: Sequence[nn.Module] = ()
    ) -> None:
        self._number, self._settings, self._device, self._frozen = number, settings, device, list(frozen)
        self._lanes = [self._lane(network)]
        self._pool = (
            ThreadPoolExecutor(number, "lane", torch.set_num_threads, (settings.threads_per_block,))
            if number > 1
            else None
        )

    def _lane(self, network: nn.Module) -> Lane:
        statistics = [x for norm in block_norms(network) for x in (norm.block_mean, norm.block_var)]
        return Lane(network, compiled(network, self._settings, self._device), statistics)

    def _copy(self) -> None:
        network, frozen = self._lanes[0].module, list(self._frozen)
        while len(self._lanes) < self._number:
            shared: dict[int, Any] = {id(p): p for p in network.parameters()}
            self._lanes.append(self._lane(copy.deepcopy(network, shared)))
            self._frozen += [shared[id(part)] for part in frozen]

    def __len__(self) -> int:
        return self._number

    @property
    def network(self) -> nn.Module:
        """The first one, perhaps compiled."""
        return self._lanes[0].network  # type: ignore[no-any-return]

    def set_training(self) -> None:
        """All but what is frozen. Going through all modules takes longer than a step of a small network: once."""
        for lane in self._lanes:
            if not lane.module.training:
                lane.network.train()
                for part in self._frozen:
                    part.eval()

    def map(self, function: Callable[[Lane, Item], Result], items: Sequence[Item]) -> list[Result]:
        """[function(a lane, item), ...]: as many at once as there are lanes, each lane one after the other."""
        if self._pool is None or len(items) < 2:
            return [function(self._lanes[0], item) for item in items]
        self._copy()
        grad = torch.is_grad_enabled()  # of each thread

        def of_lane(place: int) -> list[Result]:
            with torch.set_grad_enabled(grad):
                return [function(self._lanes[place], item) for item in items[place :: self._number]]

        results = list(self._pool.map(of_lane, range(min(self._number, len(items)))))
        return [results[i % len(results)][i // len(results)] for i in range(len(items))]
