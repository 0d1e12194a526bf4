"""What the nodes of a Ray cluster have for workers, and which nodes are fit for them."""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from dlops_dist import preflight
from dlops_dist.errors import UserError, last_line

ANSWER_S = 60
"""What a node has to say what it sees: its first process starts for it."""
LEAVING_S = 15
"""What a job that has just ended has to leave its CPUs."""


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
            odd[node] = [
                f"node {nodes[node]} cannot run dlops_dist ({last_line(error)}); install the same version there"
            ]
    return {node: found for node, found in odd.items() if found}


def _has_room(node: dict[str, Any], worker: dict[str, float]) -> bool:
    return node["Alive"] and all(node["Resources"].get(name, 0) >= amount for name, amount in worker.items())
