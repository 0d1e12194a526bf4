"""Under a real Ray on this machine, which a run starts for itself or finds: train, refuse, submit, be killed."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from command import CACHE, ROOT, TINY, call, last_checkpoint, last_step, rows, run, start, wait_until
from drilled import Drilled, lost_or_repeated, undisturbed
from fleet import Fleet, can_have_hosts
from happenings import node_killed_and_back, preempted, worker_processes, worker_stopped
from ray_nodes import RAY, free_port, head_node, node, nodes_alive

from dlops_dist.ray_metrics import GAUGES, RESTARTS

SETTINGS = [*TINY, "--blocks", "4", "--exactness", "bits", "--epochs", "2", "--name", "run"]
STEPS_PER_EPOCH, STOPPED_EPOCHS = 12, 20
ELASTIC = ["--workers", "3", "--min-workers", "1", "--collective-timeout", "20"]
LEFT_OUT = "; that node is left out"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Environment in which commands reach a cluster of 3 CPUs that was started for these tests."""
    with head_node(tmp_path_factory.mktemp("ray"), 3) as environment:
        yield environment


def train(shards, runs, *arguments, env):
    return run(*command(shards, runs, *arguments), timeout_s=180, env=env)


def command(shards, runs, *arguments):
    return "train", "q1", "--data.shards", shards, "--runs-dir", runs, *SETTINGS, *arguments


def assert_two_workers_are_as_one(arguments, result, cluster, tmp_path):
    """A command of a run called run, by Ray and in this process."""
    code, output = run(*arguments, "--runs-dir", tmp_path / "ray", "--workers", "2", env=cluster, timeout_s=180)
    assert code == 0, output
    assert "2 workers on cpu" in output
    assert output.splitlines()[-1].startswith(result)
    assert_is_that_of_one_process(tmp_path / "ray/run", *arguments)


def assert_is_that_of_one_process(run_folder, *command):
    """Its rows, and its last checkpoint byte for byte."""
    whole = run_folder.parent.parent / "whole"
    code, output = call(*command, "--runs-dir", whole, "--workers", "1", "--local")
    assert code == 0, output
    assert rows(run_folder) == rows(whole / "run")
    assert last_checkpoint(run_folder) == last_checkpoint(whole / "run")


def test_workers_of_a_ray_of_their_own_compute_what_one_process_computes_and_ask_no_stranger(shapes_shards, tmp_path):
    """Where the last cluster that was started here is not theirs, and says nothing."""
    arguments = ["train", "q1", "--data.shards", shapes_shards, *SETTINGS, "--loss", "triplet"]
    arguments += ["--optimizer.lr", "0.002"]
    with socket.create_server(("", 0)) as stranger, tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray/ray_current_cluster").write_text(f"127.0.0.1:{stranger.getsockname()[1]}")
        environment = {"RAY_TMPDIR": folder}
        assert_two_workers_are_as_one(arguments, "result: q1 triplet after 2 epochs: test loss ", environment, tmp_path)
        stranger.setblocking(False)
        with pytest.raises(BlockingIOError):
            stranger.accept()


@pytest.mark.slow
def test_a_users_recipe_on_ray_workers_computes_what_one_process_computes(cluster, shapes_shards, tmp_path):
    """The workers need not see its file, which is where the command runs."""
    recipe = tmp_path / "mine.py"
    recipe.write_bytes((ROOT / "tests/everything.py").read_bytes())
    arguments = ["train", recipe, "--data.shards", shapes_shards, "--data.cache-dir", CACHE, "--blocks", "4"]
    arguments += ["--name", "run", "--global-batch-size", "22", "--epochs", "1", "--augment.mixup", "0.2"]
    assert_two_workers_are_as_one(arguments, "result: mine after 1 epochs: test loss ", cluster, tmp_path)


@pytest.mark.slow
def test_ray_workers_embed_to_the_bytes_of_one_process(cluster, shapes_shards, tmp_path):
    recipe = tmp_path / "mine.py"
    recipe.write_bytes((ROOT / "examples/arcface.py").read_bytes())
    arguments = ["--data.shards", shapes_shards, "--data.cache-dir", CACHE, "--runs-dir", tmp_path, "--name", "run"]
    code, output = call("train", recipe, *arguments, "--local", "--epochs", "1", "--global-batch-size", "60")
    assert code == 0, output
    found = []
    for workers in ((), ("--workers", "2")):
        out = tmp_path / f"{len(found)}.parquet"
        embed = "embed", "run", shapes_shards, "--out", out, "--recipe", "mine.py", *workers
        code, output = run(*embed, env=cluster, cwd=tmp_path)
        assert code == 0, output
        assert output.splitlines()[-1] == f"{out}: embeddings of 300 samples"
        found.append(out.read_bytes())
    assert found[1] == found[0]


@pytest.mark.slow
def test_the_dashboard_listens_on_the_loopback_and_asks_for_the_token(cluster):
    address = cluster["RAY_API_SERVER_ADDRESS"]
    port = int(address.rpartition(":")[2])
    sockets = [c for c in psutil.net_connections("tcp") if c.laddr.port == port and c.status == psutil.CONN_LISTEN]
    assert [c.laddr.ip for c in sockets] == ["127.0.0.1"]
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{address}/api/jobs/", timeout=30)
    token = Path(cluster["RAY_AUTH_TOKEN_PATH"]).read_text()
    asked = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(asked, timeout=30) as answer:
        assert answer.status == 200


@pytest.mark.slow
def test_more_workers_than_the_cluster_has_is_one_line(cluster, shapes_shards, tmp_path):
    code, output = train(shapes_shards, tmp_path, "--workers", "5", "--blocks", "5", env=cluster)
    assert code == 2
    assert output.splitlines()[-1].startswith("error: workers: 5 is more than the 3 CPUs")


@pytest.mark.slow
def test_a_cluster_whose_token_is_missing_says_so_and_no_more(cluster, shapes_shards, tmp_path):
    code, output = train(shapes_shards, tmp_path, env={"RAY_ADDRESS": cluster["RAY_ADDRESS"], "HOME": tmp_path})
    assert (code, len(output.splitlines())) == (2, 2), output
    assert output.splitlines()[-1].startswith(
        f"error: RAY_ADDRESS={cluster['RAY_ADDRESS']}: what answers there does not "
    )


OCCUPY = """
import ray, time
ray.init(logging_level="ERROR")
held = ray.remote(num_cpus=2)(lambda: time.sleep(600)).remote()
while ray.available_resources().get("CPU", 0) > 1: time.sleep(0.2)
print("occupied", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_cluster_whose_cpus_are_in_use_is_one_line_and_no_wait_without_end(cluster, shapes_shards, tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", OCCUPY], env={**os.environ, **cluster}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert wait_until(lambda: "occupied" in other.stdout.readline(), 60)
        code, output = train(shapes_shards, tmp_path, "--workers", "2", env=cluster)
    finally:
        other.kill()
        other.wait()
    assert code == 2, output
    assert "workers: 2 do not fit beside what runs on the cluster: 1 of its 3 CPUs are free" in output.splitlines()[-1]


def test_no_cluster_at_the_address_is_one_line(shapes_shards, tmp_path):
    code, output = train(shapes_shards, tmp_path, env={"RAY_ADDRESS": f"127.0.0.1:{free_port()}"})
    assert code == 2, output
    assert "Traceback" not in output
    assert output.splitlines()[-1].startswith("error: RAY_ADDRESS=127.0.0.1:")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_with_a_line_and_no_restart(cluster, shapes_shards, tmp_path):
    code, output = train(shapes_shards, tmp_path, "--optimizer.lr", "1e12", "--workers", "2", env=cluster)
    assert code == 1, output
    assert output.splitlines()[-1].startswith("failed: the loss became")
    assert output.count("training and") == 1, "it was started again"


@pytest.mark.slow
def test_a_killed_worker_of_q2_changes_no_bit_of_the_result(cluster, stl_shards, tmp_path):
    command = ["train", "q2", "--data.shards", stl_shards, "--data.cache-dir", CACHE, "--name", "run", "--workers", "3"]
    command += ["--global-batch-size", "22", "--blocks", "4", "--epochs", "2", "--model.layers", "12", "9", "5"]
    command += ["--model.code-layer", "9", "--pretrain.epochs", "8", "--finetune", "--checkpoint-every", "2"]
    killed_and_whole(command, 4, 26, cluster, tmp_path)
    assert (tmp_path / "killed/run/report/confusion.png").is_file()
    assert "Nearest neighbours" in (tmp_path / "killed/run/report/index.html").read_text()


def killed_and_whole(command, after, epochs, cluster, tmp_path):
    """Kill a worker after so many epochs; compare what Ray then makes of the run with one that nothing stopped."""
    process = start(*command, "--runs-dir", tmp_path / "killed", env=cluster)
    metrics = tmp_path / "killed/run/metrics.jsonl"
    assert wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= after, 120)
    worker_processes()[0].kill()
    assert len(metrics.read_text().splitlines()) < epochs, "it finished before it was stopped"
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    (told,) = [line for line in output.splitlines() if line.startswith("warning: worker ")]
    assert re.fullmatch(
        r"warning: worker \d on node \S+ died; all go on from the last checkpoint, restart 1 of 3", told
    )
    assert " from step " in output
    assert_is_that_of_one_process(tmp_path / "killed/run", *command)


@pytest.mark.root
@pytest.mark.skipif(not can_have_hosts(), reason="no hosts without root and iproute2")
def test_nodes_that_are_lost_or_come_back_and_a_worker_that_hangs_change_no_bit(shapes_shards, tmp_path):
    """On hosts whose names are this machine's, and stand for no address that the other can reach."""
    with Fleet(tmp_path, 2, on_hosts=True) as fleet:
        drilled = Drilled(fleet, shapes_shards, tmp_path / "moved", *ELASTIC)
        drilled.begin()
        drilled.trains(3)
        for event in (node_killed_and_back, worker_stopped, preempted):
            assert all(seconds < 120 for _, seconds in event(drilled))
        step = drilled.stop()
    assert drilled.workers == [3, 2, 3, 3, 2]
    name = socket.gethostname()
    worker, goes_on = rf"warning: worker \d on node {name}", "all go on from the last checkpoint"
    expected = [
        f"{worker} died; {goes_on}, restart 1 of 20",
        "warning: the cluster has room for another number of workers; the step is saved",
        rf"{worker} has not answered for 10 s; the others give up after 20 s without it \(--collective-timeout\)",
        f"{worker} does not answer; {goes_on}, restart 2 of 20",
        f"warning: node {name} is going to be taken away; the step is saved",
        f"warning: node {name} is taken away; {goes_on}",
    ]
    told = [line for line in drilled.lines if line.startswith("warning: ")]
    assert len(told) == len(expected), told
    assert all(map(re.fullmatch, expected, told)), told
    assert lost_or_repeated(drilled.folder) == 0
    assert last_checkpoint(drilled.folder) == undisturbed(shapes_shards, {step}, tmp_path / "whole")[step]


@pytest.mark.root
def test_a_node_that_sees_other_files_is_refused_where_it_is_needed_and_else_left_out(cluster, shapes_shards, tmp_path):
    """In a mount namespace of its own: without the shards and the run, and with other code."""
    (tmp_path / "runs").mkdir()
    shutil.copytree(ROOT / "dlops_dist", tmp_path / "other")
    with (tmp_path / "other/optim.py").open("a") as file:
        file.write("# another version\n")
    hide = [f"mount --bind {tmp_path}/other {ROOT}/dlops_dist"]
    hide += [f"mount -t tmpfs none {folder}" for folder in (shapes_shards, tmp_path / "runs")]
    within = ["unshare", "--mount", "sh", "-c", " && ".join([*hide, 'exec "$0" "$@"'])]
    with node(cluster, "--address", cluster["RAY_ADDRESS"], "--num-cpus", 1, within=within):
        assert wait_until(lambda: len(nodes_alive(cluster)) == 2, 90)
        refused = train(shapes_shards, tmp_path / "runs", "--workers", "4", env=cluster)
        assert not (tmp_path / "runs/run").exists()
        trained = train(shapes_shards, tmp_path / "runs", "--workers", "3", "--epochs", "1", env=cluster)
    assert wait_until(lambda: len(nodes_alive(cluster)) == 1, 90)
    for (code, output), expected, prefix, suffix in ((refused, 2, "error: ", ""), (trained, 0, "warning: ", LEFT_OUT)):
        assert code == expected, output
        shards, runs, version = [line for line in output.splitlines() if line.startswith(prefix)]
        assert shards.startswith(f"{prefix}data.shards: {shapes_shards} are not there on node ")
        assert runs.startswith(f"{prefix}runs_dir: {tmp_path}/runs/run is not there on node ")
        assert version.startswith(f"{prefix}dlops_dist is ")
        assert version.endswith(f"; install the same everywhere{suffix}")
    assert "3 workers on cpu" in trained[1]


def job(cluster, *arguments, **options):
    """(exit code, everything printed) of `ray job`."""
    environment = {k: v for k, v in {**os.environ, **cluster}.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [str(part) for part in (RAY, "job", *arguments)], env=environment, capture_output=True, text=True,
        timeout=180, check=False, **options,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def training(shards, runs, *arguments):
    command = [sys.executable, "-m", "dlops_dist.train", "q1", "--loss", "center", "--data.shards", shards]
    return [*command, "--runs-dir", runs, "--workers", "2", *SETTINGS, *arguments]


@pytest.mark.slow
def test_a_job_may_bring_the_code_along_but_not_the_data_and_its_exit_code_is_true(cluster, shapes_shards, tmp_path):
    working_copy = ("submit", "--working-dir", ROOT)
    code, output = job(cluster, *working_copy, "--", *training(shapes_shards, tmp_path))
    assert code == 0, output
    assert "result: q1 center after 2 epochs" in output
    assert len(rows(tmp_path / "run")) == 2
    code, output = job(cluster, "submit", "--", *training(shapes_shards, tmp_path, "--seed", "3"))
    assert code != 0
    assert "choose another --name" in output
    for wrong, place in (("runs_dir", (shapes_shards, "runs")), ("data.shards", ("shards/any", tmp_path))):
        code, output = job(cluster, *working_copy, "--", *training(*place))
        assert code != 0
        assert f"error: {wrong}: " in output
        assert "pass an absolute path that every node sees" in output
        assert "Traceback" not in output


@pytest.mark.slow
def test_what_still_calls_ray_after_we_left_neither_joins_nor_starts_a_cluster(cluster):
    """As the thread that waits for the trainer does after a Ctrl-C."""
    script = """
from dlops_dist.ray_cluster import cluster
with cluster(print):
    import ray
try:
    ray.put(1)
except ray.exceptions.RaySystemError as error:
    print(error)
print("connected:", ray.is_initialized())
"""
    result = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **cluster}, cwd=ROOT, check=True, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert result.stdout.splitlines()[-1] == "connected: False"


@pytest.mark.slow
@pytest.mark.parametrize("after", ["connecting to Ray", "data.reader: "])
def test_ctrl_c_while_ray_starts_what_is_needed_is_one_line(after, cluster, shapes_shards, tmp_path):
    process = start("train", *training(shapes_shards, tmp_path)[3:], env=cluster)
    assert any(line.startswith(after) for line in process.stdout)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output.splitlines()[-1:]) == (
        130,
        ["interrupted; the same command goes on where it can"],
    )
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_stopped_job_and_a_stopped_command_go_on_to_the_same_bits(cluster, shapes_shards, tmp_path):
    """No step is taken twice."""
    command = training(shapes_shards, tmp_path / "stopped", "--epochs", str(STOPPED_EPOCHS), "--log-every", "1")
    folder = tmp_path / "stopped/run"
    code, output = job(cluster, "submit", "--no-wait", "--submission-id", tmp_path.name, "--", *command)
    assert code == 0, output
    assert wait_until(lambda: last_step(folder) >= 15, 120)
    assert wait_until(lambda: set(told_to_prometheus(cluster)) == {*GAUGES, RESTARTS}, 20, every_s=0.5)
    code, output = job(cluster, "stop", tmp_path.name)
    assert code == 0, output
    assert "STOPPED" in job(cluster, "status", tmp_path.name)[1].upper()
    first = stopped_at(folder)

    process = start("train", *command[3:], env=cluster)
    assert wait_until(lambda: last_step(folder) >= first + 15, 120)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "stopping as soon as the step is saved; once more stops at once" in output.splitlines()
    assert output.splitlines()[-1] == "interrupted; the same command goes on where it can"
    assert f" from step {first}" in output
    assert "Traceback" not in output
    second = stopped_at(folder)

    code, output = run("train", *command[3:], env=cluster, timeout_s=180)
    assert code == 0, output
    assert f" from step {second}" in output
    assert_is_that_of_one_process(folder, "train", *command[3:])


def told_to_prometheus(cluster):
    """{name: value} of the run's gauges, where Ray lets Prometheus read them."""
    try:
        answer = urllib.request.urlopen(cluster["METRICS"])
    except urllib.error.URLError:  # it does not listen yet
        return {}
    with answer:
        lines = re.findall(r'^ray_dlops_dist_(\w+)\{.*run="run".*\} (\S+)$', answer.read().decode(), re.MULTILINE)
    return {name: float(value) for name, value in lines}


def stopped_at(folder):
    """The last step, which is saved."""
    step = last_step(folder)
    assert max((folder / "checkpoints").iterdir()).name == f"step-{step:09d}.pt"
    assert step < STOPPED_EPOCHS * STEPS_PER_EPOCH, "it finished before it was stopped"
    return step
