"""A function over a list in several processes, which end with the one that started them, however that ends."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

_held: list[Any] = []
"""What a process was given once: opened once, its file handles serve all its calls."""


def in_processes(function: Callable[[Any, Any], Any], held: Any, items: Sequence[Any], processes: int) -> Iterator[Any]:
    """function(held, item) for each item, in order. In this process where there is one item, or one process."""
    if processes == 1 or len(items) <= 1:
        yield from (function(held, item) for item in items)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(items)), spawn, _start, (function, held)) as pool:
        yield from pool.map(_call, items)


def _start(function: Callable[[Any, Any], Any], held: Any) -> None:
    _held[:] = function, held
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(item: Any) -> Any:
    function, held = _held
    return function(held, item)
