"""Weights & Biases from the command line: offline files read back, and a server that refuses."""

import json
import re
import struct
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from command import TINY, rows, run
from wandb.proto import wandb_internal_pb2

from dlops_dist.trackers import run_id

BLOCK = 32768


def train(shards, runs, *arguments, **options):
    arguments = ("--data.shards", shards, "--runs-dir", runs, *TINY, "--epochs", "3", "--name", "run", *arguments)
    return run("train", "q1", "--local", *arguments, **options)


def records(file):
    """What an offline file holds: a header of 7 bytes, then blocks of pieces (checksum, length, kind, content)."""
    data, position, content = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        content += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            content = b""
            yield record


def logged(folder):
    """(run, its settings, its rows) of the only offline file below a folder."""
    (file,) = folder.rglob("offline-run-*/*.wandb")
    read = list(records(file))
    (started,) = [record.run for record in read if record.WhichOneof("record_type") == "run"]
    history = [record.history.item for record in read if record.WhichOneof("record_type") == "history"]
    settings = {item.key: json.loads(item.value_json) for item in started.config.update}
    return (
        started,
        settings,
        [{i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in row} for row in history],
    )


def test_an_offline_file_holds_the_settings_every_epoch_and_logged_steps(shapes_shards, tmp_path):
    environment = {"HOME": str(tmp_path), "WANDB_RUN_GROUP": "sweep: lr/0.1"}
    code, output = train(shapes_shards, tmp_path, "--wandb", "offline", "--log-every", "5", env=environment)
    assert code == 0, output
    started, settings, history = logged(tmp_path / "run")
    epochs = [row for row in history if "epoch" in row]
    assert (started.display_name, started.run_group) == ("run", "sweep: lr/0.1")
    assert started.run_id == run_id("sweep: lr/0.1", "run")
    assert (settings["optimizer.lr"], settings["classes"]) == (0.02, 10)
    for ours, theirs in zip(rows(tmp_path / "run"), epochs, strict=True):
        assert theirs.items() >= {name: v for name, v in ours.items() if not isinstance(v, list)}.items()
    steps = [json.loads(line) for line in (tmp_path / "run/steps.jsonl").read_text().splitlines()]
    assert [row["step/step"] for row in history if "step/step" in row] == [row["step"] for row in steps] != []


@contextmanager
def server(answer):
    """Environment that leads W&B to a server which answers (code, body) by path and query."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            code, body = answer(self.path, content.decode(errors="replace"))
            body = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_POST  # noqa: N815

        def log_message(self, *_):
            pass

    stub = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=stub.serve_forever, daemon=True).start()
    try:
        yield {"WANDB_BASE_URL": f"http://127.0.0.1:{stub.server_port}", "WANDB_API_KEY": "0" * 40}
    finally:
        stub.shutdown()


def refusing(path, content):
    return 403, {"errors": [{"message": "no such entity"}]}


@pytest.mark.slow
def test_a_server_that_refuses_the_run_is_told_and_all_is_logged_offline(shapes_shards, tmp_path):
    with server(refusing) as environment:
        code, output = train(shapes_shards, tmp_path, "--wandb", "online", env=environment)
    assert code == 0, output
    assert "warning: wandb: " in output
    assert "wandb sync" in output
    assert "Traceback" not in output
    assert len(logged(tmp_path / "run")[2]) == 3


def breaking(path, content):
    """Begins a run, and then answers what makes W&B's own process crash."""
    if path != "/graphql":
        return 403, {}
    project = {"id": "p", "name": "dlops_dist", "entity": {"id": "e", "name": "e"}}
    query = re.search(r"(?:query|mutation) (\w+)", json.loads(content)["query"])[1]
    if query == "RunResumeStatus":
        return 200, {"data": {"model": {**project, "bucket": None}}}
    if query == "UpsertBucket":
        bucket = {"id": "r", "name": "run", "displayName": "run", "historyLineCount": 0, "project": project}
        return 200, {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
    return 200, {"data": {}}


@pytest.mark.slow
def test_a_crash_of_wandb_in_the_middle_stops_nothing(shapes_shards, tmp_path):
    with server(breaking) as environment:
        code, output = train(shapes_shards, tmp_path, "--wandb", "online", "--epochs", "12", env=environment)
    assert code == 0, output
    assert output.count("warning: wandb: ") == 1, output
    assert "Traceback" not in output, output
    assert len(rows(tmp_path / "run")) == 12
