"""What one of Ray's workers does: meets the others, trains, saves and stops when it is told to."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from dlops_dist.config import Run, recipe_from_source
from dlops_dist.distributed.interfaces import use_interface_of
from dlops_dist.errors import RunError, UserError
from dlops_dist.events import Failed, Listener, Placed, Warned
from dlops_dist.ray_metrics import RayMetrics
from dlops_dist.trackers import trackers_of

WISH_EVERY_S = 0.5
"""Between looks at whether the workers are to stop."""
SIGTERMED = threading.Event()
"""Whether this worker has got the signal."""
TO_SAVE, SAVED = threading.Event(), threading.Event()
"""Whether this worker is to save the step, and has."""
SAVE_S = 60
"""How long it may take."""
SIGTERM_SAVED, WITH_IT = "ended by SIGTERM, once the step was saved", "ended with another"
"""What a worker says that ends early."""


def begin(address: str) -> None:
    """What a worker does first, in its main thread: meet the others at its node's address, end with its step saved."""
    use_interface_of(address)
    before = signal.getsignal(signal.SIGTERM)

    def note(*_: object) -> None:
        SIGTERMED.set()
        signal.signal(signal.SIGTERM, before)  # another one ends it at once

    signal.signal(signal.SIGTERM, note)


def save_now(limit_s: float) -> bool:
    """Let the step be saved while training goes on in another thread. Returns whether it was, in time."""
    SAVED.clear()
    TO_SAVE.set()
    return SAVED.wait(limit_s)


def wishes_to_save() -> Callable[[], bool]:
    """Tells whoever trains, who asks at each step, when to save; asked again, all of it is written."""
    told = False

    def is_to_save() -> bool:
        nonlocal told
        if told:
            TO_SAVE.clear()
            SAVED.set()
        told = not told and TO_SAVE.is_set()
        return told

    return is_to_save


def train_on_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train as one of a group. Returns the last row of metrics; what a restart would only meet again is told."""
    import ray
    from ray.train.torch import get_device

    from dlops_dist.distributed.collectives import world_size

    recipe, events = recipe_from_source(config["task"], config["source"]), config["events"]
    settings = recipe.settings_type(**config["settings"])
    is_first, workers = ray.train.get_context().get_world_rank() == 0, world_size()
    if is_first:
        events.put_nowait(Placed(str(ray.get_runtime_context().get_placement_group_id())))
    asked_to_stop = _asked_to_stop(config["wish"]) if is_first else lambda: False
    try:
        return fit_here(
            config["task"], settings, events.put_nowait, get_device(),
            stop=lambda: SIGTERMED.is_set() or asked_to_stop(), save=wishes_to_save(),
        )  # fmt: skip
    except (UserError, RunError) as error:
        if world_size() == workers:  # Ray takes a group apart while it trains, and nothing is a sum then
            events.put_nowait(Failed(error))
        raise
    except KeyboardInterrupt as error:
        if asked_to_stop():
            events.put_nowait(Failed(error))
        raise RuntimeError(SIGTERM_SAVED if SIGTERMED.is_set() else WITH_IT) from None


def _asked_to_stop(wish: str) -> Callable[[], bool]:
    """Whether whoever started the workers wishes them to stop, looked up now and then."""
    from ray.experimental.internal_kv import _internal_kv_exists

    looked, found = 0.0, False

    def asked_to_stop() -> bool:
        nonlocal looked, found
        if not found and time.monotonic() - looked > WISH_EVERY_S:
            found, looked = bool(_internal_kv_exists(wish)), time.monotonic()
        return found

    return asked_to_stop


def fit_here(
    task: str, settings: Run, listener: Listener, device: Any = None, stop: Callable[[], bool] = lambda: False,
    save: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:  # fmt: skip
    """Train in this process of Ray's, with the threads that it is given. Returns the last row of metrics."""
    import torch

    from dlops_dist.data.memory import keep_freed_memory
    from dlops_dist.engine import fit

    torch.set_num_threads(num_threads(os.environ.get("OMP_NUM_THREADS", "")))
    keep_freed_memory()
    listeners: list[Listener] = [
        listener,
        RayMetrics(str(settings.name)),
        *trackers_of(settings, lambda text: listener(Warned(text))),
    ]
    return fit(settings, task=task, device=device, listeners=listeners, stop=stop, save=save)


def num_threads(omp_num_threads: str) -> int:
    """Of a worker: what OMP_NUM_THREADS says of its outermost level, which Ray sets where nobody has; else 1."""
    outermost = omp_num_threads.split(",", maxsplit=1)[0].strip()
    return max(1, int(outermost)) if outermost.isdecimal() else 1
