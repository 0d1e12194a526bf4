"""What is told of a run's Ray workers: who controls them, which are lost, what is waited for."""

import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import (
    PreemptingState,
    ResizingState,
    RestartingState,
    RunningState,
)
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)
from ray.train.v2.api.exceptions import PreemptionError

from dlops_dist.config import Run, common_settings
from dlops_dist.engine.run_folder import RunFolder
from dlops_dist.errors import last_line
from dlops_dist.events import Begun, Warned
from dlops_dist.ray_metrics import RESTARTS, gauge
from dlops_dist.ray_worker import SAVE_S, SIGTERM_SAVED, WITH_IT, begin, save_now

SILENT_S = 30.0
"""How long a worker has not answered that is told of, and named where the others then give up. Its process is stopped,
or just busy: it is never ended for that.
"""
WHY = {WorkerHealthCheckFailedError: "died", WorkerHealthCheckTimeoutError: "does not answer"}


class Teller(ControllerCallback, WorkerGroupCallback):
    """Tells who controls the workers of a run, which of them are lost, and what is waited for."""

    def __init__(self, events: Any, settings: Run) -> None:
        self.events = events
        self.settings = common_settings(settings.model_dump())  # where a user's own class may not be known
        self.wait_s = settings.node_wait if settings.min_workers is None else None
        self.places: list[Any] = []
        self.group: Any = None
        self.first: Any = None
        self.silent: set[int] = set()
        self.restarts = 0
        self.gauge: Any = None

    def after_controller_start(self, train_run_context: Any) -> None:
        self.events.actor.put_nowait.remote(Begun(ray.get_runtime_context().current_actor))
        self.gauge = gauge(RESTARTS, "How often the workers were started again", str(self.settings.name))
        if self.wait_s is None:
            _take_over(str(RunFolder.of(self.settings)), f"train-{train_run_context.run_id}")

    def before_init_train_context(self, workers: Any) -> dict[str, list[Any]]:
        ray.get([worker.execute_async(begin, worker.metadata.node_ip) for worker in workers])
        return {}

    def after_worker_group_start(self, worker_group: Any) -> None:
        workers = worker_group.get_workers()
        self.group, self.first, self.silent = worker_group, workers[0], set()
        self.places = [worker.metadata for worker in workers]

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        self.gauge.set(self.restarts)  # Ray forgets what is not told again
        timeout_s = self.settings.collective_timeout
        silent_s = min(SILENT_S, timeout_s / 2)
        polls = getattr(self.group, "_world_rank_to_ongoing_poll", {})
        silent = {rank for rank, poll in polls.items() if time.monotonic() - poll.start_time > silent_s}
        for rank in sorted(silent - self.silent):
            self.warn(
                f"{self.named(rank)} has not answered for {silent_s:.0f} s; the others give up after {timeout_s} s "
                f"without it (--collective-timeout)"
            )
        self.silent = silent

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(current_state, RestartingState):
            self.warn(self.restarted(current_state.training_failed_error))
        if not isinstance(previous_state, RunningState):
            return
        if isinstance(current_state, PreemptingState):
            what = f"{self.taken(current_state.preemption_info)} is going to be taken away"
        elif isinstance(current_state, ResizingState):
            what = "the cluster has room for another number of workers"
        else:
            return
        self.warn(f"{what}; {'the step is saved' if self.saved() else 'the step could not be saved in time'}")

    def warn(self, text: str) -> None:
        self.events.actor.put_nowait.remote(Warned(text))

    def saved(self) -> bool:
        with suppress(ray.exceptions.RayError):
            return bool(ray.get(self.first.execute_async(save_now, SAVE_S), timeout=2 * SAVE_S))
        return False

    def named(self, rank: int) -> str:
        return f"worker {rank} on node {self.places[rank].hostname}"

    def taken(self, preempted: Any) -> str:
        names = sorted({self.places[rank].hostname for rank in preempted.preempted_ranks})
        return f"node {', '.join(names)}"

    def restarted(self, error: Any) -> str:
        if isinstance(error, PreemptionError):
            return f"{self.taken(error.preemption_info)} is taken away; all go on from the last checkpoint"
        self.restarts += 1
        failures = getattr(error, "worker_failures", {})
        lost = {rank: WHY[type(failed)] for rank, failed in failures.items() if type(failed) in WHY}
        if not lost:  # whoever fails for want of a silent one only says so
            lost = dict.fromkeys(self.silent, "does not answer")
        if not lost:
            said = {rank: last_line(failed).removeprefix("RuntimeError: ") for rank, failed in failures.items()}
            causes = {rank: text for rank, text in said.items() if text != WITH_IT} or said
            rank, text = next(iter(causes.items()), (0, ""))
            lost = {rank: text if text == SIGTERM_SAVED else f"failed: {text}"} if causes else {}
        there = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        told = {self.named(rank): lost[rank] for rank in sorted(lost)}
        gone = {self.places[rank].hostname for rank in lost if self.places[rank].node_id not in there}
        return _loss(told, gone, self.restarts, self.settings.max_restarts, self.wait_s)


def _take_over(run: str, requester: str) -> None:
    """Let go of the nodes that the run's last controller asked for: Ray keeps them for it for three minutes, even where
    it was ended with its driver.
    """
    key = f"dlops_dist {run}"
    if (last := _internal_kv_get(key)) is not None:
        TrainAutoscalingCoordinatorClient(last.decode()).cancel_resource_request()
    _internal_kv_put(key, requester)


def _loss(lost: Mapping[str, str], gone: Collection[str], restart: int, limit: int, wait_s: int | None) -> str:
    """What is said of workers that are lost, and of the nodes that are gone with them, if they are waited for."""
    what = ", ".join(f"{worker} {why}" for worker, why in lost.items()) or "the workers are lost"
    text = f"{what}; all go on from the last checkpoint, restart {restart} of {limit}"
    if gone and wait_s is not None:
        text += (
            f", once there is a node in place of {', '.join(sorted(gone))}: they wait {wait_s} s for it; "
            f"with --min-workers, the others would go on alone"
        )
    return text
