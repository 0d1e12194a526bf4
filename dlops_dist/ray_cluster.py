"""A Ray cluster to train on: connect to it, see what it has to give, and whether its nodes are alike."""

import logging
import os
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dlops_dist import preflight
from dlops_dist.config import Run
from dlops_dist.errors import RunError, UserError
from dlops_dist.files import leave_room_for_sockets

CONNECT_TIMEOUT_S = 10
ANSWER_S = 60
"""What a node has to say what it sees: its first process starts for it."""
LEAVING_S = 15
"""What a job that has just ended has to leave its CPUs."""
HEAD_TELL_S, HEAD_WAIT_S = 10, 40
"""How long a head has not answered that is told of, and given up: Ray ends our process after 60 s, without a word."""
UPLOADED = "working_dir_files"
TRAIN_V2 = "RAY_TRAIN_V2_ENABLED"
REFUSALS = {
    "Version mismatch": "Install the same versions here and there",
    "No node info found": "Run the command on a node of that cluster, or send it there with 'ray job submit'",
}
"""What Ray says where it does not join a cluster, and what to do."""
START_ONE = "start one with 'ray start --head', or unset RAY_ADDRESS to have Ray started for the run"
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
    if os.environ.get(TRAIN_V2, "1").lower() not in ("1", "true"):
        raise UserError(f"{TRAIN_V2}={os.environ[TRAIN_V2]}: this trains by Ray Train V2; unset it")
    given = os.environ.get("RAY_ADDRESS")
    address = given or "local"
    if address == "local":
        say("starting Ray on this machine")
        _start()
    else:
        say(f"connecting to Ray at {address}")
        _connect(address)
    import ray

    try:
        yield
    finally:
        ray.shutdown()
        if given is None:
            os.environ.pop("RAY_ADDRESS", None)
        else:
            os.environ["RAY_ADDRESS"] = given


def _start() -> None:
    leave_room_for_sockets("RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR")
    import ray

    try:
        ray.init("local", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except OSError as error:
        if error.filename is None or ".ray" not in Path(error.filename).parts:
            raise
        raise UserError(
            f"HOME={Path.home()}: Ray cannot keep its token there ({error.strerror}); set it to a folder of yours"
        ) from None


def _connect(given: str) -> None:
    import ray

    address = address_of_head(given)
    try:
        if not _lets_us_in(address):
            raise ConnectionError
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ray.exceptions.AuthenticationError):
        raise UserError(
            f"RAY_ADDRESS={given}: what answers there does not let us in; set RAY_AUTH_MODE, and RAY_AUTH_TOKEN or "
            f"RAY_AUTH_TOKEN_PATH, as they are on the head, where 'ray get-auth-token' shows the token"
        ) from None
    except RuntimeError as error:
        if (advice := next((advice for said, advice in REFUSALS.items() if said in str(error)), None)) is None:
            raise
        raise UserError(f"RAY_ADDRESS={given}: {' '.join(str(error).split())} {advice}") from None


def _lets_us_in(address: str) -> bool:
    """Whether a head takes our token, or that we have none; Ray would ask it again and again, with a line for each."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    generated: Any = gcs_service_pb2
    with init_grpc_channel(address) as channel:
        try:
            NodeInfoGcsServiceStub(channel).GetClusterId(generated.GetClusterIdRequest(), timeout=CONNECT_TIMEOUT_S)
        except grpc.RpcError as error:
            return error.code() != grpc.StatusCode.UNAUTHENTICATED
    return True


def address_of_head(given: str) -> str:
    """HOST:PORT of the cluster that RAY_ADDRESS names, where something listens: Ray would ask silence for minutes.

    Raises:
        UserError: it is none, or nothing listens there.
    """
    where, address = f"RAY_ADDRESS={given}", given
    if given == "auto":
        from ray._private.services import canonicalize_bootstrap_address

        try:
            address = str(canonicalize_bootstrap_address("auto"))
        except ConnectionError:
            raise UserError(f"{where}: no cluster runs on this machine; {START_ONE}") from None
        where += f" ({address})"
    if "://" in address:
        raise UserError(
            f"{where}: a URL is for 'ray job submit' or Ray Client; on a node of the cluster, name its head by "
            f"HOST:PORT, as 'ray start --head' prints it (by default port 6379)"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"{where} is not HOST:PORT, as 'ray start --head' prints it (by default port 6379)")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, UnicodeError) as error:
        raise UserError(f"{where}: no cluster answers ({error}); {START_ONE}") from None
    return address


class Head:
    """The head of the cluster that we are connected to, which ends with it."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._address, self._at = address, (host.strip("[]"), int(port))
        self._answered, self._told = time.monotonic(), False

    def warning(self) -> str | None:
        """What is to be said, once, of a head that does not answer.

        Raises:
            RunError: it has not for too long.
        """
        with suppress(OSError):
            socket.create_connection(self._at, timeout=2).close()
            self._answered, self._told = time.monotonic(), False
        silent = time.monotonic() - self._answered
        if silent > HEAD_WAIT_S:
            raise RunError(f"the cluster's head, {self._address}, is lost; start one, and the same command goes on")
        if silent < HEAD_TELL_S or self._told:
            return None
        self._told = True
        return f"the cluster's head, {self._address}, does not answer; it is waited for, {HEAD_WAIT_S} s in all"


def refuse_uploaded_folder(settings: Run) -> None:
    """A job's working directory is a copy that Ray deletes: nothing may be written there, and data is not in it."""
    for name, place in (("runs_dir", settings.runs_dir), ("data.shards", settings.data.shards)):
        if UPLOADED in Path(place).absolute().parts:
            raise UserError(
                f"{name}: {place} would be in the folder that Ray uploaded for this job and deletes after it; pass an "
                f"absolute path that every node sees"
            )


def resources_for(workers: int | None, without: Collection[str] = ()) -> tuple[dict[str, float], int]:
    """What each worker gets, and how many there are: a GPU each where the cluster has GPUs, else CPUs.

    What other jobs use is not theirs to have. A job that has just ended is given time to leave.

    Args:
        without: ids of nodes that are not to be used.
    """
    import ray
    from ray._private.state import available_resources_per_node

    nodes = {
        node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in without
    }
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


def places_for(
    workers: int | None, shards: str, folder: str, file: str, warn: Callable[[str], None] | None = None
) -> tuple[dict[str, float], int, dict[str, str]]:
    """What each worker gets, how many there are, and where: a label selector for nodes that are as this one.

    Args:
        workers: as `resources_for` takes it.
        folder: that all must see, with the file in it.
        warn: told of each node that is left out, where the others have room for all workers; None needs all nodes.

    Raises:
        UserError: other nodes see other shards, not the file, or run other versions.
    """
    resources, num_workers = resources_for(workers)
    odd = _odd_nodes(resources, shards, folder, file)
    lines = list(dict.fromkeys(line for found in odd.values() for line in found))
    if not odd:
        return resources, num_workers, {}
    try:
        if warn is None:
            raise UserError
        resources, _ = resources_for(num_workers, without=odd)
    except UserError:
        raise UserError("\nerror: ".join(lines)) from None
    for line in lines:
        warn(f"{line}; that node is left out")
    return resources, num_workers, {"ray.io/node-id": f"!in({','.join(odd)})"}


def _odd_nodes(worker: dict[str, float], shards: str, folder: str, file: str) -> dict[str, list[str]]:
    """By id, what is wrong with each node that has what a worker needs and is not as this one."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if _has_room(node, worker)}
    nodes.pop(ray.get_runtime_context().get_node_id(), None)
    if not nodes:
        return {}
    look = ray.remote(num_cpus=0)(preflight.look)
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        asked[look.options(scheduling_strategy=there).remote(shards, folder, file)] = node
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
    silence = f"does not answer in {ANSWER_S} s; restart Ray there"
    odd = {asked[call]: [f"node {nodes[asked[call]]} {silence}"] for call in silent}
    here = preflight.look(shards, folder, file)
    for call in answered:
        node = asked[call]
        try:
            odd[node] = preflight.complaints(here, ray.get(call), shards, folder)
        except ray.exceptions.RayError as error:
            why = str(error).strip().splitlines()[-1]
            odd[node] = [f"node {nodes[node]} cannot run dlops_dist ({why}); install the same version there"]
    return {node: found for node, found in odd.items() if found}


def _has_room(node: dict[str, Any], worker: dict[str, float]) -> bool:
    return node["Alive"] and all(node["Resources"].get(name, 0) >= amount for name, amount in worker.items())
