"""A Ray cluster to train on: connect to it, see what it has to give, and whether its nodes are alike."""

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dlops_dist import preflight
from dlops_dist.config import Settings
from dlops_dist.errors import UserError

CONNECT_TIMEOUT_S = 10
ANSWER_S = 60
"""What a node has to say what it sees: its first process starts for it."""
LEAVING_S = 15
"""What a job that has just ended has to leave its CPUs."""
UPLOADED = "working_dir_files"
QUIET = {
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that still calls Ray after we have left must not join or start another
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextmanager
def cluster(say: Callable[[str], None]) -> Iterator[None]:
    """Connected to a cluster: never to a stranger's that happens to run here."""
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    address = os.environ.get("RAY_ADDRESS", "local")
    say("starting Ray on this machine" if address == "local" else f"connecting to Ray at {address}")
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


def refuse_uploaded_folder(settings: Settings) -> None:
    """A job's working directory is a copy that Ray deletes: nothing may be written there, and data is not in it."""
    for name, place in (("runs_dir", settings.runs_dir), ("data.shards", settings.data.shards)):
        if UPLOADED in Path(place).absolute().parts:
            raise UserError(
                f"{name}: {place} would be in the folder that Ray uploaded for this job and deletes after it; pass an "
                f"absolute path that every node sees"
            )


def resources_for(workers: int | None) -> tuple[dict[str, float], int]:
    """What each worker gets, and how many there are: a GPU each where the cluster has GPUs, else CPUs.

    What other jobs use is not theirs to have. A job that has just ended is given time to leave.
    """
    import ray
    from ray._private.state import available_resources_per_node

    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    gpus = int(sum(node.get("GPU", 0) for node in nodes.values()))
    num_workers = workers or gpus or 1
    if gpus and num_workers > gpus:
        raise UserError(f"workers: {num_workers} is more than the {gpus} GPUs of the cluster; pass --workers {gpus}")
    cpus_for_each(_sizes(nodes.values()), num_workers, gpus > 0)
    deadline = time.monotonic() + LEAVING_S
    while True:
        free = [resources for node, resources in available_resources_per_node().items() if node in nodes]
        try:
            cpus = cpus_for_each(_sizes(free), num_workers, gpus > 0)
            return {"CPU": cpus, **({"GPU": 1} if gpus else {})}, num_workers
        except UserError:
            if time.monotonic() > deadline:
                total, unused = (int(sum(node.get("CPU", 0) for node in group)) for group in (nodes.values(), free))
                raise UserError(
                    f"workers: {num_workers} do not fit beside what runs on the cluster: {unused} of its {total} CPUs "
                    f"are free; wait till it ends ('ray status' shows it), or pass fewer --workers"
                ) from None
        time.sleep(1)


def _sizes(nodes: Iterable[dict[str, float]]) -> list[tuple[int, int]]:
    """(CPUs, GPUs) of each node."""
    return [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes]


def cpus_for_each(nodes: Sequence[tuple[int, int]], num_workers: int, on_gpus: bool) -> int:
    """The most CPUs that every worker can have when each must fit on one of the nodes (CPUs, GPUs)."""
    for cpus in range(max((node for node, _ in nodes), default=0), 0, -1):
        if sum(min(node // cpus, gpus) if on_gpus else node // cpus for node, gpus in nodes) >= num_workers:
            return cpus
    total = sum(node for node, _ in nodes)
    what = "CPUs of the cluster, beside its GPUs" if on_gpus else "CPUs of the cluster"
    raise UserError(f"workers: {num_workers} is more than the {total} {what}; pass fewer --workers or start more nodes")


def check_nodes(shards: str, folder: str, file: str) -> None:
    """Refuse a cluster whose other nodes see other shards, not the folder with its file, or run other versions."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    others = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    del others[here]
    if not others:
        return
    look = ray.remote(num_cpus=0)(preflight.look)
    asked = {}
    for node in others:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        asked[look.options(scheduling_strategy=there).remote(shards, folder, file)] = node
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
    lines = [f"node {others[asked[call]]} does not answer in {ANSWER_S} s; restart Ray there" for call in silent]
    seen = []
    for call in answered:
        try:
            seen.append(ray.get(call))
        except ray.exceptions.RayError as error:
            why = str(error).strip().splitlines()[-1]
            lines.append(f"node {others[asked[call]]} cannot run dlops_dist ({why}); install the same version there")
    lines += preflight.complaints(preflight.look(shards, folder, file), seen, shards, folder)
    if lines:
        raise UserError("\nerror: ".join(lines))
