"""One process owns a run, on whatever machine: who is refused, who may take over, and when."""

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time

import pytest

from dlops_dist.engine import lease as leases
from dlops_dist.engine.lease import LEASE, lease, owner
from dlops_dist.engine.run_folder import RunFolder
from dlops_dist.errors import RunError
from dlops_dist.files import Folder

HOLD = """
import sys, time
from dlops_dist.engine.lease import lease
from dlops_dist.files import Folder
with lease(Folder(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["a folder", "a URL"])
def folder(request, tmp_path):
    return Folder(tmp_path if request.param == "a folder" else f"file://{tmp_path}")


@pytest.fixture
def of_another(folder):
    """A lease of a process on another machine; called, it is renewed."""
    content = {"owner": "another", "host": "elsewhere", "boot": "b", "process": 7, "renewed": 0}

    def renew():
        content["renewed"] += 1
        folder.write_text(LEASE, json.dumps(content))

    renew()
    return renew


def test_a_lease_is_gone_with_what_it_was_held_for(folder):
    with lease(folder):
        assert json.loads(folder.open(LEASE).read())["process"] == os.getpid()
    assert folder.names() == []


def test_whoever_lives_on_this_machine_is_not_waited_for_and_whoever_died_is_succeeded_at_once(folder, user_error):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        started = time.monotonic()
        with user_error(folder, f"process {holder.pid} on {platform.node()}", "another --name"), lease(folder):
            pass
        holder.kill()
        holder.wait()
        told = []
        with lease(folder, told.append):
            assert (told, time.monotonic() - started < 10) == ([], True)


def test_whoever_renews_it_elsewhere_is_refused_after_a_look(folder, of_another, monkeypatch, user_error):
    monkeypatch.setattr(leases, "LOST_S", 20.0)
    renewing = threading.Timer(0.5, of_another)
    renewing.start()
    told = []
    with user_error(folder, "process 7 on elsewhere"), lease(folder, told.append):
        pass
    renewing.join()
    assert told == [f"{folder} belonged to process 7 on elsewhere; watching for 20 s whether that still lives"]
    assert owner(folder) == "another"


def test_whoever_does_not_is_succeeded_after_the_stated_time(folder, of_another, monkeypatch):
    monkeypatch.setattr(leases, "LOST_S", 1.0)
    started = time.monotonic()
    with lease(folder):
        assert 1 < time.monotonic() - started < 10
        assert owner(folder) not in ("another", None)


def test_a_run_that_another_has_taken_over_is_written_to_no_more(folder, of_another, monkeypatch):
    run = RunFolder(str(folder))
    folder.delete(LEASE)
    monkeypatch.setattr(leases, "RENEW_S", 0.2)
    with pytest.raises(RunError, match="is now trained by process 7 on elsewhere; this process has"), lease(folder):
        run.note_owner()
        run.add_steps([{"step": 1}])
        of_another()
        for write in (lambda: run.add_steps([{}]), lambda: run.add_row({}), lambda: run.save(None, {"step": 2})):
            with pytest.raises(RunError, match="is now trained by process 7 on elsewhere"):
                write()
        signal.pause()  # until the look at the lease finds it
    assert folder.names() == [LEASE, "steps.jsonl"]
    assert owner(folder) == "another"


@pytest.mark.parametrize("rubbish", ["", "{}", "5", '{"owner": '])
def test_a_lease_that_says_nothing_is_taken_over_after_the_stated_time(rubbish, folder, monkeypatch):
    monkeypatch.setattr(leases, "LOST_S", 0.5)
    folder.write_text(LEASE, rubbish)
    told = []
    with lease(folder, told.append):
        assert owner(folder) is not None
    assert len(told) == 1
    assert folder.names() == []
