"""A Ray cluster to train on: connected to, or started here; and its head, with which it ends."""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dlops_dist.config import Run
from dlops_dist.errors import RunError, UserError
from dlops_dist.sockets import leave_room_for_sockets

CONNECT_TIMEOUT_S = 10
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
