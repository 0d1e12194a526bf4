"""The checkpoints of a run: copied between two steps, written beside the next ones, checked when they are read."""

import io
import re
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePath
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from dlops_dist.distributed.collectives import bytes_of_first_rank, world_size
from dlops_dist.errors import RunError, first_line
from dlops_dist.files import PARTIAL, Folder

T = TypeVar("T")
ANEW = "remove the run's folder to train anew, or choose another --name"
FILE = re.compile(r"step-(\d{9,})\.pt")


class Checkpoints:
    """Files step-NNNNNNNNN.pt in a folder, each the whole state after so many steps.

    Args:
        folder: their own.
        kept: how many of the latest stay; `save` may name others.
    """

    def __init__(self, folder: Folder, kept: int) -> None:
        self._folder, self.kept = folder, kept
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None
        self._copy: Any = None

    def steps(self) -> list[int]:
        """Of the checkpoints that are there, ascending."""
        return sorted(int(found[1]) for found in map(FILE.fullmatch, self._folder.names()) if found)

    def name(self, step: int) -> str:
        """What a person is told of the file."""
        return str(self._folder / _file(step))

    def save(self, step: int, state: dict[str, Any], also_kept: int | None = None) -> None:
        """Write the state of a step, and forget older ones: all but the latest, and that of the step `also_kept`.

        Returns once the state is copied; training may go on and change it. A thread writes the copy; the one before
        is waited for. The memory of the copy is kept for the next.

        Raises:
            RunError: the one before could not be written.
        """
        self.wait()
        self._copy = _copied(state, self._copy)
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()  # once for all tensors
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing = self._writer.submit(self._write, step, self._copy, also_kept)

    def wait(self) -> None:
        """Until the last one is safe.

        Raises:
            RunError: it could not be written.
        """
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except Exception as error:  # torch ends a disk's error by one of its own; each remote storage has others
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            why = getattr(cause, "strerror", None) or cause
            raise RunError(f"{self._folder}: {why}; mend that, then the same command goes on") from error

    def load(self, step: int, device: torch.device) -> dict[str, Any]:
        """The state of a step.

        Raises:
            RunError: the file is damaged.
        """
        return self._read(step, lambda file: _state_of(file, device))

    def _read(self, step: int, result: Callable[[BinaryIO], T]) -> T:
        try:
            with self._folder.open(_file(step)) as file:
                damaged = zipfile.ZipFile(file).testzip()  # torch reads flipped bits without a word
                if damaged is not None:
                    raise ValueError(f"the checksum of {PurePath(damaged).name} is wrong")
                file.seek(0)
                return result(file)
        except Exception as error:  # torch and zipfile raise many kinds for a damaged file
            raise RunError(f"{self.name(step)} cannot be read ({first_line(error)})") from None

    def latest(self, device: torch.device, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """The state of the latest step whose file is whole; None where there are no files.

        Raises:
            RunError: all of them are damaged.
        """
        return self._latest(lambda file: _state_of(file, device), warn)

    def latest_of_all_ranks(self, device: torch.device, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """The same, read and checked by rank 0 alone, which sends it to the others: however many there are, the file
        is read once, and all go on from one step, also where a node's view of a shared folder lags behind.
        """
        if world_size() == 1:
            return self.latest(device, warn)
        content = bytes_of_first_rank(lambda: self._latest(lambda file: file.read(), warn), device)
        return None if content is None else _state_of(io.BytesIO(content), device)

    def _latest(self, result: Callable[[BinaryIO], T], warn: Callable[[str], None]) -> T | None:
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self._read(step, result)
            except RunError as error:
                warn(f"{error}; going back to the one before")
        if steps:
            raise RunError(f"{self._folder}: none of the checkpoints can be read; {ANEW}")
        return None

    def _write(self, step: int, state: dict[str, Any], also_kept: int | None) -> None:
        self._folder.write(_file(step), lambda file: torch.save(state, file), PARTIAL)  # a killed one's is replaced
        earlier = [s for s in self.steps() if s < step]
        for old in earlier[: max(0, len(earlier) + 1 - self.kept)]:
            if old != also_kept:
                self._folder.delete(_file(old))


def _state_of(file: BinaryIO, device: torch.device) -> dict[str, Any]:
    return torch.load(file, map_location=device, weights_only=True)  # type: ignore[no-any-return]


def _file(step: int) -> str:
    return f"step-{step:09d}.pt"


def _copied(tree: Any, memory: Any) -> Any:
    """A nested state with copies of its tensors on the CPU, in the memory of an earlier copy where that fits."""
    if isinstance(tree, Tensor):
        fits = isinstance(memory, Tensor) and (memory.shape, memory.dtype, memory.stride()) == (
            tree.shape, tree.dtype, tree.stride(),
        )  # fmt: skip
        own = memory if fits else torch.empty_like(tree, device="cpu", pin_memory=tree.is_cuda)
        return own.copy_(tree, non_blocking=True)
    if isinstance(tree, dict):
        known = memory if isinstance(memory, dict) else {}
        return {name: _copied(value, known.get(name)) for name, value in tree.items()}
    if isinstance(tree, list):
        old = memory if isinstance(memory, list) and len(memory) == len(tree) else [None] * len(tree)
        return [_copied(value, place) for value, place in zip(tree, old, strict=True)]
    return tree
