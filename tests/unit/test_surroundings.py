"""What stands in people's environment: folders that are too long or not theirs, addresses that are none."""

import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from fsspec.implementations.memory import MemoryFileSystem
from ray._private import services

from dlops_dist import ray_cluster, shard, sockets
from dlops_dist.engine import fit
from dlops_dist.errors import RunError
from dlops_dist.files import temporary_folder
from dlops_dist.ray_cluster import Head, address_of_head, cluster
from dlops_dist.ray_telling import _loss
from dlops_dist.ray_worker import num_threads
from dlops_dist.recipes.q1 import Settings as Q1
from dlops_dist.sockets import LONGEST_SOCKET, leave_room_for_sockets
from dlops_dist.train import main as train


def silent(text):
    """Nobody listens."""


@pytest.fixture
def long_folder(tmp_path, monkeypatch):
    """TMPDIR, of more than the 80 characters that a job's may have."""
    folder = tmp_path / ("job-" + "0" * 80)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    if os.environ["TMPDIR"] != str(folder):
        shutil.rmtree(Path(os.environ["TMPDIR"]).parent)


def test_below_a_long_temporary_folder_sockets_still_have_room(long_folder):
    leave_room_for_sockets()
    short = os.environ["TMPDIR"]
    with tempfile.NamedTemporaryFile() as file:
        assert file.name.startswith(short)
        assert (long_folder / Path(file.name).name).is_file()
    path = Path(short + LONGEST_SOCKET)
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    assert (long_folder / LONGEST_SOCKET[1:]).is_socket()
    assert temporary_folder() == long_folder
    leave_room_for_sockets()
    assert os.environ["TMPDIR"] == short, "it is chosen once"


def test_a_short_temporary_folder_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/tmp")
    leave_room_for_sockets()
    assert os.environ["TMPDIR"] == "/tmp"
    monkeypatch.delenv("TMPDIR")
    leave_room_for_sockets()
    assert "TMPDIR" not in os.environ


def test_a_long_one_is_named_where_nothing_shorter_is_to_be_had(long_folder, monkeypatch, user_error):
    monkeypatch.setattr(sockets, "SHORT_FOLDERS", ("/proc",))
    with user_error("TMPDIR", long_folder, "bytes"):
        leave_room_for_sockets()


def test_a_machine_without_a_temporary_folder_is_told_so(monkeypatch, user_error):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc"])
    with user_error("TMPDIR"):
        temporary_folder()


UNWRITABLE = ["/proc/nowhere", "/dev/null"]


@pytest.mark.parametrize("place", UNWRITABLE)
@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_ray_is_not_started_where_nothing_can_be_written(name, place, monkeypatch, user_error):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(name, place)
    with user_error(name, place, "set it"), cluster(silent):
        pass


def test_ray_tells_where_its_token_has_no_place(monkeypatch, user_error):
    def init(*_, **__):
        raise PermissionError(13, "Permission denied", "/proc/.ray/auth_token")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.setattr(ray, "init", init)
    with user_error("HOME=/proc", "Permission denied"), cluster(silent):
        pass


@pytest.mark.parametrize("place", UNWRITABLE)
def test_a_runs_folder_that_cannot_be_written_to_is_one_line(place, shapes_shards, monkeypatch, user_error):
    for arguments in (["--smoke"], ["--local", "--data.shards", str(shapes_shards)]):
        monkeypatch.setattr(sys, "argv", ["train", "q1", *arguments, "--runs-dir", place])
        with user_error("runs_dir", place, "cannot be written to", "--runs-dir"):
            train()
    settings = Q1(runs_dir=place, data={"shards": str(shapes_shards)}, model={"width": 8})
    with user_error("runs_dir", place, "cannot be written to", "--runs-dir"):
        fit(settings)


@pytest.mark.parametrize("place", UNWRITABLE)
def test_packing_to_where_nothing_can_be_written_is_one_line(place, tiny_zip, monkeypatch, user_error):
    monkeypatch.setattr(sys, "argv", ["shard", "tiny-imagenet", "--source", str(tiny_zip), "--out", place])
    with user_error("--out", place, "cannot be written to"):
        shard.main()


ADDRESSES = {
    "no port": "head", "a number as port": "head:http", "no such port": "head:70000", "no host": ":6379",
    "Ray Client": "ray://head:10001", "the dashboard": "http://head:8265",
}  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES.values(), ids=ADDRESSES)
def test_an_address_that_is_none_is_one_line(address, monkeypatch, user_error):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with user_error(f"RAY_ADDRESS={address}", "HOST:PORT", "ray start --head"), cluster(silent):
        pass


@pytest.fixture
def listening(monkeypatch):
    """HOST:PORT at which something answers, and nothing comes of it."""
    monkeypatch.setattr(ray_cluster, "CONNECT_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_an_address_where_something_listens_is_taken(listening):
    assert address_of_head(listening) == listening


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "a..b"])
def test_an_address_where_nothing_answers_is_one_line(host, listening, user_error):
    port = listening.rpartition(":")[2] if host != "127.0.0.1" else "1"
    with user_error(f"RAY_ADDRESS={host}:{port}", "no cluster answers", "unset RAY_ADDRESS"):
        address_of_head(f"{host}:{port}")


@pytest.mark.parametrize("left_over", [None, "127.0.0.1:1"])
def test_auto_without_a_cluster_is_one_line_also_where_one_has_been(left_over, tmp_path, monkeypatch, user_error):
    monkeypatch.setattr(services, "find_gcs_addresses", set)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    if left_over:
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray/ray_current_cluster").write_text(left_over)
    shown = ":1): no cluster answers" if left_over else "no cluster runs"
    with user_error("RAY_ADDRESS=auto", shown, "unset RAY_ADDRESS"), cluster(silent):
        pass


REFUSALS = {
    "no token": (ray.exceptions.AuthenticationError("no authentication token was found"), ["RAY_AUTH_TOKEN"]),
    "another token": (ConnectionError("Failed to connect to Ray cluster at 1.2.3.4:6379"), ["RAY_AUTH_TOKEN"]),
    "another Ray": (RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9\n"), ["Ray: 2.9"]),
    "no node": (RuntimeError("No node info found matching attributes: '1.2.3.4'"), ["ray job submit"]),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_cluster_that_does_not_let_us_in_is_one_line(refusal, listening, monkeypatch, user_error):
    error, shown = REFUSALS[refusal]

    def init(*_, **__):
        raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", listening)
    with user_error(f"RAY_ADDRESS={listening}: ", *shown), cluster(silent):
        pass


def test_what_else_goes_wrong_in_ray_is_not_hidden(listening, monkeypatch):
    def init(*_, **__):
        raise RuntimeError("a fault of Ray's own")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", listening)
    with pytest.raises(RuntimeError, match="own"), cluster(silent):
        pass


@pytest.mark.parametrize("value", ["0", "false", "no", ""])
def test_ray_train_of_before_is_refused(value, monkeypatch, user_error):
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", value)
    with user_error(f"RAY_TRAIN_V2_ENABLED={value}: ", "unset it"), cluster(silent):
        pass


@pytest.mark.parametrize(
    ("value", "number"), [("4", 4), ("3,2", 3), (" 2 ", 2), ("0", 1), ("", 1), ("all", 1), ("-1", 1)]
)
def test_a_worker_has_as_many_threads_as_the_environment_says(value, number):
    assert num_threads(value) == number


def test_a_url_that_cannot_be_written_to_is_one_line(shapes_shards, monkeypatch, user_error):
    def refuse(*_, **__):
        raise PermissionError("AccessDenied: no\nrequest id: 7")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    settings = Q1(runs_dir="memory://bucket/runs", name="run", data={"shards": str(shapes_shards)}, model={"width": 8})
    with user_error("runs_dir: memory://bucket/runs/run cannot be written to (AccessDenied: no)"):
        fit(settings)


def test_a_lost_worker_is_told_and_its_lost_node_where_that_is_waited_for():
    lost = {"worker 1 on node b": "died"}
    told = "worker 1 on node b died; all go on from the last checkpoint, restart 2 of 3"
    assert _loss(lost, [], 2, 3, 900) == _loss(lost, ["b"], 2, 3, None) == told
    waiting = _loss(lost, ["b"], 2, 3, 900)
    assert waiting.startswith(f"{told}, once there is a node in place of b: they wait 900 s for it; with --min-workers")


def test_a_head_that_does_not_answer_is_told_once_and_given_up_in_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(ray_cluster, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        head = Head(address)
        now[0] = 100
        assert head.warning() is None
    told = []
    for now[0] in (105, 111, 115, 139):
        told.append(head.warning())
    assert told == [None, f"the cluster's head, {address}, does not answer; it is waited for, 40 s in all", None, None]
    now[0] = 141
    with pytest.raises(RunError, match=rf"the cluster's head, {address}, is lost; start one, and the same"):
        head.warning()
