"""Runs a task on the workers of a Ray cluster. The only importer of ray for training."""

import _thread
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlops_dist.config import Settings
from dlops_dist.engine.events import Event
from dlops_dist.errors import RunError, UserError
from dlops_dist.tracking import Console, Wandb

MAX_RESTARTS = 3
COLLECTIVE_TIMEOUT_S = 300
CONNECT_TIMEOUT_S = 10
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class Failed:
    """A worker met a mistake or a failed run that a restart would only meet again."""

    error: UserError | RunError


def train_on_ray(task: str, settings: Settings, console: Console) -> dict[str, Any]:
    """Train a prepared run on the cluster of RAY_ADDRESS, or on one started for it here. Returns the last row.

    Each worker calls `fit`, which goes on from the run's last checkpoint: so does a group that Ray restarts.
    """
    with _cluster(console):
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.util.queue import Queue

        resources, num_workers = _resources(settings.workers)
        console.say(f"starting {num_workers} Ray worker{'s' * (num_workers > 1)} with {resources} each")
        events = Queue(actor_options={"num_cpus": 0})
        listening = _Listening(events, console)
        trainer = TorchTrainer(
            _train_on_worker,  # type: ignore[arg-type]
            train_loop_config={"task": task, "settings": settings.model_dump(), "events": events},
            torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
            scaling_config=ScalingConfig(
                num_workers=num_workers, use_gpu="GPU" in resources, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=settings.name, storage_path=str(Path(settings.runs_dir) / ".ray"),
                failure_config=FailureConfig(max_failures=MAX_RESTARTS),
                worker_runtime_env={"env_vars": _wandb_environment(settings)},  # type: ignore[call-arg]
            ),
        )  # fmt: skip
        try:
            return trainer.fit().return_value  # type: ignore[attr-defined]
        except SystemExit:  # Ray's handler of Ctrl-C, which _Listening also uses
            raise listening.failure or KeyboardInterrupt from None
        except ray.train.TrainingFailedError as error:
            if listening.failure is not None:
                raise listening.failure from None
            raise RunError(_shortened(error)) from error
        finally:
            listening.stop()


def _wandb_environment(settings: Settings) -> dict[str, str]:
    """What W&B needs of the environment, its key included: handed on only where it is used."""
    used = settings.wandb != "off"
    return {name: value for name, value in os.environ.items() if used and name.startswith("WANDB_")}


@contextmanager
def _cluster(console: Console) -> Iterator[None]:
    """Connected to a cluster: never to a stranger's that happens to run here."""
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    address = os.environ.get("RAY_ADDRESS", "local")
    console.say("starting Ray on this machine" if address == "local" else f"connecting to Ray at {address}")
    import ray

    options = {"include_dashboard": False} if address == "local" else {}
    _refuse_silence(address)
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", **options)  # type: ignore[arg-type]
    except ConnectionError as error:
        raise _no_cluster(address, error) from None
    try:
        yield
    finally:
        ray.shutdown()


def _refuse_silence(address: str) -> None:
    """Ray itself asks an address where nothing listens for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise _no_cluster(address, error) from None


def _no_cluster(address: str, error: OSError) -> UserError:
    return UserError(f"RAY_ADDRESS={address}: no cluster answers ({error}); start one with 'ray start --head'")


def _resources(workers: int | None) -> tuple[dict[str, float], int]:
    """What each worker gets, and how many there are: a GPU each where the cluster has GPUs, else CPUs."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    num_workers = workers or gpus or 1
    if gpus and num_workers > gpus:
        raise UserError(f"workers: {num_workers} is more than the {gpus} GPUs of the cluster; pass --workers {gpus}")
    cpus = cpus_for_each([(int(n.get("CPU", 0)), int(n.get("GPU", 0))) for n in nodes], num_workers, gpus > 0)
    return {"CPU": cpus, **({"GPU": 1} if gpus else {})}, num_workers


def cpus_for_each(nodes: Sequence[tuple[int, int]], num_workers: int, on_gpus: bool) -> int:
    """The most CPUs that every worker can have when each must fit on one of the nodes (CPUs, GPUs)."""
    for cpus in range(max((node for node, _ in nodes), default=0), 0, -1):
        if sum(min(node // cpus, gpus) if on_gpus else node // cpus for node, gpus in nodes) >= num_workers:
            return cpus
    total = sum(node for node, _ in nodes)
    what = "CPUs of the cluster, beside its GPUs" if on_gpus else "CPUs of the cluster"
    raise UserError(f"workers: {num_workers} is more than the {total} {what}; pass fewer --workers or start more nodes")


def _train_on_worker(config: dict[str, Any]) -> dict[str, Any]:
    import torch
    from ray.train.torch import get_device

    from dlops_dist.config import TASKS
    from dlops_dist.engine import fit

    settings, events = TASKS[config["task"]](**config["settings"]), config["events"]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    listeners = [events.put_nowait]
    if settings.wandb != "off":
        listeners.append(Wandb(settings.wandb, Path(settings.runs_dir) / str(settings.name)))
    try:
        return fit(settings, task=config["task"], device=get_device(), listeners=listeners)  # type: ignore[arg-type]
    except (UserError, RunError) as error:
        events.put_nowait(Failed(error))
        raise


class _Listening:
    """A thread that passes the workers' events on to the console, and ends the run at a failure worth no restart."""

    def __init__(self, events: Any, console: Console) -> None:
        self.failure: UserError | RunError | None = None
        self._events, self._console = events, console
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Pass on what is still under way, then end."""
        self._done.set()
        self._thread.join()

    def _listen(self) -> None:
        from ray.exceptions import RayError
        from ray.util.queue import Empty

        while True:
            last = self._done.is_set()
            try:
                while True:
                    self._handle(self._events.get(timeout=0.2))
            except Empty:
                if last:
                    return
            except RayError:  # the queue's process is gone, and with it what it held
                return

    def _handle(self, event: Event | Failed) -> None:
        if not isinstance(event, Failed):
            self._console(event)
        elif self.failure is None:
            self.failure = event.error
            _thread.interrupt_main()


def _shortened(error: Exception) -> str:
    """The last line of the first worker's traceback, which names the exception."""
    failures = getattr(error, "worker_failures", {})
    text = str(next(iter(failures.values()), error)).strip()
    return f"{text.splitlines()[-1]} (after {MAX_RESTARTS} restarts)"
