"""A function over a list in several processes, which end with the one that started them, however that ends."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from dlops_dist.errors import RunError

GONE = EOFError, BrokenPipeError, ConnectionResetError
"""What a pipe says whose other end is closed."""


def in_processes(function: Callable[[Any, Any], Any], held: Any, items: Sequence[Any], processes: int) -> Iterator[Any]:
    """function(held, item) for each item, in order. In this process where there is one item, or one process.

    Whoever has done an item is given the next. (The standard library's executor may wait for ever for a process that
    was killed while it started.)

    Raises:
        RunError: a process was killed.
    """
    if processes == 1 or len(items) <= 1:
        yield from (function(held, item) for item in items)
        return
    with _started(function, held, min(processes, len(items))) as pipes, ThreadPoolExecutor(len(pipes)) as pool:
        idle = SimpleQueue[Connection]()
        for pipe in pipes:
            idle.put(pipe)

        def result_of(item: Any) -> Any:
            pipe = idle.get()
            try:
                pipe.send(item)
                succeeded, value = pipe.recv()
            finally:
                idle.put(pipe)
            if not succeeded:
                raise value
            return value

        try:
            yield from pool.map(result_of, items)
        except GONE:
            raise RunError(
                "a process that shared the work was killed, for memory perhaps; the same command goes on, with fewer "
                "--workers in less memory"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _started(function: Callable[[Any, Any], Any], held: Any, number: int) -> Iterator[list[Any]]:
    """Our ends of the pipes to so many processes, which end when these are closed."""
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for _ in range(number):
            ours, theirs = spawn.Pipe()
            pipes.append(ours)
            with theirs, _interrupts_held_back():
                process = spawn.Process(target=_serve, args=(theirs, function, held))
                process.start()
            processes.append(process)
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join()


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """A Ctrl-C comes after this; processes that are started meanwhile leave it to the one that started them."""
    resource_tracker.ensure_running()  # its own start would end the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: "Connection[Any, Any]", function: Callable[[Any, Any], Any], held: Any) -> None:
    """Answer each item that comes by (whether it succeeded, result or error). What is held opens its files once."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(*GONE):
        while True:
            item = pipe.recv()
            try:
                answer = True, function(held, item)
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = False, error
            pipe.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
