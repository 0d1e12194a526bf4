"""Runs a task on the workers of a Ray cluster."""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, wait
from contextlib import ExitStack, closing, suppress
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

from dlops_dist.config import Run, load_recipe
from dlops_dist.console import Console
from dlops_dist.engine.run_folder import CONFIG, RunFolder
from dlops_dist.errors import RunError, UserError, first_line, last_line
from dlops_dist.events import Begun, Event, Failed, Placed, Started, Warned
from dlops_dist.files import Folder, temporary_folder
from dlops_dist.ray_cluster import Head, cluster
from dlops_dist.ray_places import places_for
from dlops_dist.ray_worker import WISH_EVERY_S, train_on_worker
from dlops_dist.signals import stop_signals

START_TIMEOUT_S, ELASTIC_START_TIMEOUT_S = 60, 25
"""How long Ray waits for all workers; for fewer, where that is allowed, it waits less. (15 s was slower.)"""
APART_S = 5
"""How long a group may take to part before it is ended; one with a worker that hangs does not. (Ray gives it 30 s.)"""
GROW_S = 20
"""Between looks at whether the cluster has room for more workers again."""
LEAVE_S = 10
"""How long a controller has to start that is to be killed, and the thread that waits for it to notice."""


def train_on_ray(task: str, settings: Run, console: Console) -> None:
    """Train a prepared run on the cluster of RAY_ADDRESS, or on one started for it here."""
    with cluster(console.say):
        warn = console.warn if settings.min_workers is None else None
        resources, num_workers, places = places_for(
            settings.workers, settings.data.shards, str(RunFolder.of(settings)), CONFIG, warn
        )
        if settings.min_workers is not None and settings.min_workers > num_workers:
            raise UserError(f"min_workers: {settings.min_workers} is more than the {num_workers} workers")
        console.say(f"starting {num_workers} Ray worker{'s' * (num_workers > 1)} with {resources} each")
        with ExitStack() as stack:
            asked_to_stop: list[Callable[[], bool]] = []
            group = train_group(
                task, settings, num_workers, resources, wandb_environment(settings), places,
                stop=lambda: any(asked() for asked in asked_to_stop),
            )  # fmt: skip
            for event in stack.enter_context(closing(group)):
                if isinstance(event, Started) and not asked_to_stop:  # before that, there is nothing to save
                    asked_to_stop.append(stack.enter_context(stop_signals(console.say)))
                if not isinstance(event, Placed):
                    console(event)


def train_group(
    task: str, settings: Run, num_workers: int, resources: dict[str, float], environment: dict[str, str],
    places: dict[str, str], stop: Callable[[], bool] = lambda: False,
) -> Generator[Event | Placed]:  # fmt: skip
    """Train a prepared run on a group of workers, and yield what rank 0 tells.

    Each worker calls `fit`, which goes on from the run's last checkpoint: so does a group that Ray restarts.

    Args:
        resources: of each worker.
        environment: of each worker, beside its node's.
        places: label selector for the nodes to use.
        stop: asked all the time whether the workers are to save the step and stop.

    Raises:
        KeyboardInterrupt: they have.
        UserError, RunError: that of a worker, at once, as a restart would only meet it again; or the group died once
            more than it may be restarted.
    """
    import ray
    from ray.exceptions import RayError
    from ray.experimental.internal_kv import _internal_kv_put
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    events: Any = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})  # it outlives the other nodes
    wish = f"dlops_dist stop {uuid4().hex}"
    ended = _in_background(_trainer(task, settings, num_workers, resources, environment, places, events, wish).fit)
    left = threading.Event()

    def tell_the_end(_: object) -> None:  # after all that the workers told; to nobody once we have left
        if not left.is_set():
            _put(events, None)

    ended.add_done_callback(tell_the_end)
    controller = None
    head = Head(ray.get_runtime_context().gcs_address)
    asked = events.actor.get.remote()  # an event that an interrupt keeps from us can still be had
    try:
        while True:
            if stop():
                _internal_kv_put(wish, b"")
            if not ray.wait([asked], timeout=WISH_EVERY_S)[0]:
                if (warning := head.warning()) is not None:
                    yield Warned(warning)
                continue
            if (event := ray.get(asked)) is None:
                break
            asked = events.actor.get.remote()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Begun):
                controller = event.controller
            else:
                yield event
    except RayError:  # the queue's process is gone, and with it what it held
        pass
    except BaseException:  # whoever disconnects while a thread calls Ray may crash
        left.set()
        controller = controller or _begun(asked)
        if controller is not None:
            ray.kill(controller)
            wait([ended], LEAVE_S)
        raise
    _result(ended, settings.max_restarts)


def _result(ended: Future[Any], restarts: int) -> None:
    """Of the training, once it has ended; as an error of the run's own where Ray gave it up."""
    import ray
    from ray.exceptions import RayError

    try:
        ended.result()
    except ray.train.TrainingFailedError as error:
        failures = getattr(error, "worker_failures", {})
        why = last_line(next(iter(failures.values()), error))
        raise RunError(f"{why} (after {restarts} restarts)") from error
    except RayError as error:
        lost = f"what controls Ray's workers is lost ({type(error).__name__})"
        raise RunError(f"{lost}; the same command goes on, on a new head where this one has ended") from error


def _trainer(
    task: str, settings: Run, num_workers: int, resources: dict[str, float], environment: dict[str, str],
    places: dict[str, str], events: Any, wish: str,
) -> Any:  # fmt: skip
    """What Ray trains by: how many workers, with what, how often they are started again, how long waited for."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.constants import TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    from dlops_dist.ray_telling import Teller

    # else what cleans up after a run asks the last cluster that was started on its machine, dead or a stranger's
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    os.environ.setdefault(TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S, str(APART_S))
    ENV_VARS_TO_PROPAGATE.update(("RAY_ADDRESS", TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S))

    least = settings.min_workers
    start_timeout_s = START_TIMEOUT_S if least is None else ELASTIC_START_TIMEOUT_S
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(start_timeout_s)
    storage = Folder(settings.runs_dir).local or temporary_folder()
    teller: Any = Teller(events, settings)
    return TorchTrainer(
        train_on_worker,  # type: ignore[arg-type]
        train_loop_config={
            "task": task, "source": load_recipe(task).source, "settings": settings.model_dump(), "events": events,
            "wish": wish,
        },
        torch_config=TorchConfig(timeout_s=settings.collective_timeout),
        scaling_config=ScalingConfig(
            num_workers=num_workers if least is None else (least, num_workers),  # type: ignore[arg-type]
            use_gpu="GPU" in resources, resources_per_worker=resources, label_selector=places or None,
            elastic_resize_monitor_interval_s=GROW_S,  # type: ignore[call-arg]
        ),
        run_config=RunConfig(
            name=settings.name, storage_path=str(storage / ".ray"), callbacks=[teller],
            failure_config=FailureConfig(
                max_failures=settings.max_restarts,
                controller_failure_limit=settings.node_wait // start_timeout_s,  # type: ignore[call-arg]
            ),
            worker_runtime_env={"env_vars": environment},  # type: ignore[call-arg]
        ),
    )  # fmt: skip


def _begun(asked: Any) -> Any:
    """The controller that the next event, the first of all, tells of; None where it does not start in time."""
    import ray

    with suppress(ray.exceptions.RayError):
        event = ray.get(asked, timeout=LEAVE_S)
        return event.controller if isinstance(event, Begun) else None
    return None


def _in_background(call: Callable[[], Any]) -> Future[Any]:
    """The outcome of a call in a thread that nobody waits for when the process ends."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


def _put(events: Any, event: object) -> None:
    """Into a queue, if its process still lives."""
    from ray.exceptions import RayError

    with suppress(RayError):
        events.put_nowait(event)


def wandb_environment(settings: Run) -> dict[str, str]:
    """What W&B needs of the environment, its key included: handed on only where it is used."""
    if settings.wandb == "off":
        return {}
    found = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    return {name: str(Path(value).absolute()) if name == "WANDB_DIR" else value for name, value in found.items()}


def map_on_ray(
    function: Callable[[Any, Any], Any], job: Any, parts: Iterable[Any], workers: int, shards: str, run: str,
    say: Callable[[str], None],
) -> Generator[Any]:  # fmt: skip
    """`function(job, part)` of each part, in their order, by workers of RAY_ADDRESS, or of a cluster started here.

    Raises:
        UserError, RunError: that of a worker; or workers died over and over.
    """
    import ray

    with cluster(say):
        resources, num_workers, places = places_for(workers, shards, run, CONFIG, say)
        say(f"starting {num_workers} Ray worker{'s' * (num_workers > 1)} with {resources} each")
        needs: dict[str, Any] = {
            "num_cpus": resources["CPU"],
            "num_gpus": resources.get("GPU", 0),
            "label_selector": places,
        }
        task: Any = ray.remote(**needs)(function)
        remaining, flying = iter(parts), deque[Any]()
        try:
            while True:
                flying.extend(task.remote(job, part) for part in islice(remaining, num_workers - len(flying)))
                if not flying:
                    return
                yield ray.get(flying.popleft())
        except ray.exceptions.RayTaskError as error:
            known = isinstance(error.cause, UserError | RunError)
            raise (error.cause if known else error) from None
        except ray.exceptions.RayError as error:
            raise RunError(f"a Ray worker died, and again in its place: {first_line(error)}") from error
