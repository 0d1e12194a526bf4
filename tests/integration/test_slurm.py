"""A job of a real SLURM, on two hosts of this machine: trains, is told to end, is queued again, goes on."""

import os
import shutil
import socket
import subprocess
from contextlib import ExitStack, contextmanager

import pytest
from command import ROOT, TINY, last_step, wait_until
from ray_nodes import hosts
from test_ray import assert_is_that_of_one_process

CONF = """
ClusterName=trial
SlurmctldHost={host}(10.77.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
NodeName=n1 NodeAddr=10.77.0.1 NodeHostname=n1 CPUs=1
NodeName=n2 NodeAddr=10.77.0.2 NodeHostname=n2 CPUs=1
PartitionName=all Nodes=n1,n2 Default=YES State=UP
"""


@contextmanager
def slurm(folder):
    """Runs a command of SLURM's, and gives what it prints."""
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(CONF.format(host=socket.gethostname(), folder=folder))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    folder.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment["SLURM_CONF"] = str(folder / "slurm.conf")
    munge = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"]
    munge += [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    with hosts(folder, 2) as ((first, _), (second, _)), ExitStack() as started:
        for command in ([*munge], [*first, "slurmctld", "-D"], [*first, "slurmd", "-D", "-N", "n1"],
                        [*second, "slurmd", "-D", "-N", "n2"]):  # fmt: skip
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            started.callback(process.wait)
            started.callback(process.kill)

        def call(*command):
            done = subprocess.run(
                [*first, *map(str, command)], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
            )
            return done.stdout + done.stderr

        assert wait_until(lambda: call("sinfo", "--noheader", "--format=%D %t").strip() == "2 idle", 60), call("sinfo")
        yield call


@pytest.mark.root
@pytest.mark.skipif(shutil.which("slurmctld") is None, reason="SLURM is not installed (slurm-wlm, munge)")
def test_a_job_that_is_told_to_end_is_queued_again_and_goes_on_to_the_same_bits(shapes_shards, tmp_path):
    arguments = ["q1", "--data.shards", shapes_shards, "--runs-dir", tmp_path / "runs", *TINY, "--name", "run"]
    arguments += ["--blocks", "4", "--workers", "2", "--epochs", "9", "--log-every", "1"]
    run, log = tmp_path / "runs/run", tmp_path / "job.log"
    with slurm(tmp_path) as call:
        options = ["--nodes=2", "--cpus-per-task=1", "--gpus-per-node=0", f"--output={log}", "--parsable"]
        job = call("sbatch", *options, "launch/slurm.sh", *arguments).strip()
        assert wait_until(lambda: last_step(run) >= 15, 180), log.read_text()
        call("scancel", "--signal=USR1", "--batch", job)
        assert wait_until(lambda: "it is queued again" in log.read_text(), 60), log.read_text()
        stopped = last_step(run)
        assert wait_until(lambda: call("squeue", "--noheader", "--format=%t").strip() == "PD", 90, 1), call("squeue")
        call("scontrol", "update", f"JobId={job}", "StartTime=now")  # SLURM would wait for two minutes
        assert wait_until(lambda: "result: " in log.read_text(), 200, 1), log.read_text()
        assert wait_until(lambda: not call("squeue", "--noheader").strip(), 60, 1), call("squeue")
    assert f" from step {stopped}" in log.read_text()
    assert_is_that_of_one_process(run, "train", *arguments)
