"""Nodes of a Ray cluster on this machine, or on hosts that share nothing with it but its files."""

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from command import wait_until
from ray._common.utils import get_default_ray_temp_dir

RAY = Path(sys.executable).parent / "ray"
RAYS = get_default_ray_temp_dir()
"""Folder of Ray's own files, on each host."""


@contextmanager
def head_node(folder, cpus, within=(), address="127.0.0.1", options=()):
    """Environment in which commands reach a cluster that asks for a token."""
    ports = [free_port() for _ in range(4)]
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    mode = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    head = ["--head", "--port", ports[0], "--dashboard-port", ports[1], "--dashboard-agent-listen-port", ports[2]]
    head += ["--node-ip-address", address, "--num-cpus", cpus, "--metrics-export-port", ports[3]]
    head += ["--system-config", json.dumps({"metrics_report_interval_ms": 1000})]
    with node(mode, *head, *options, within=within) as process:
        assert wait_until(lambda: process.poll() is not None or listens(ports[1], within), 120)
        assert process.poll() is None, "ray start ended"
        dashboard = {
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports[1]}",
            "METRICS": f"http://{address}:{ports[3]}",
        }
        yield {**mode, **dashboard, "RAY_ADDRESS": f"{address}:{ports[0]}"}


@contextmanager
def node(environment, *options, within=()):
    """A node of a cluster, under way; in the end it is killed with all that it started."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | environment
    clean.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        [*within, RAY, "start", "--block", "--disable-usage-stats", *map(str, options)],
        env=clean, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        kill_all(process)


def kill_all(process):
    if process.poll() is None:
        for started in reversed([process, *psutil.Process(process.pid).children(recursive=True)]):
            with suppress(psutil.NoSuchProcess):  # it ended meanwhile
                started.kill()
        process.wait(timeout=30)


def nodes_alive(cluster, within=()):
    """{address: id} of the nodes that the cluster has."""
    script = "import json, ray; ray.init(logging_level='ERROR'); nodes = [n for n in ray.nodes() if n['Alive']]; "
    script += "print('alive', json.dumps([(n['NodeManagerAddress'], n['NodeID']) for n in nodes]))"
    command = [*within, sys.executable, "-c", script]
    done = subprocess.run(command, env={**os.environ, **cluster}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.split("alive ")[1].splitlines()[0])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(port, within=()):
    script = f"import socket; socket.create_connection(('127.0.0.1', {port}))"
    return subprocess.run([*within, sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


@contextmanager
def hosts(folder, number):
    """(prefix of a command, address) of each of so many hosts: namespaces with a network between them. Needs root.

    All have this machine's name, which stands for no address that the others can reach. Ray's files are of this
    machine on the first, and of its own on each of the others, where one command runs: nodes that begin at once in one
    folder choose the same names for their sockets.
    """
    (folder / "hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()}\n")
    named, private = f"mount --bind {folder}/hosts /etc/hosts", f"mkdir -p {RAYS} && mount -t tmpfs none {RAYS}"
    names = [host_name(place) for place in range(number)]
    first, places, inside = names[0], range(1, number), []
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", first, "link", "add", "bridge", "type", "bridge")
        for place in places:
            peer = ["peer", "name", "net", "netns", names[place]]
            ip("link", "add", f"to{place}", "netns", first, "type", "veth", *peer)
            ip("-n", first, "link", "set", f"to{place}", "master", "bridge", "up")
        for place, device in enumerate(["bridge", *("net" for _ in places)]):
            ip("-n", names[place], "addr", "add", f"10.77.0.{place + 1}/24", "dev", device)
            ip("-n", names[place], "link", "set", device, "up")
        for place, name in enumerate(names):
            mounts = " && ".join([named, private] if place else [named])
            within = "nsenter", f"--net=/var/run/netns/{name}", "unshare", "--mount", "sh", "-c"
            inside.append(((*within, f'{mounts} && exec "$0" "$@"'), f"10.77.0.{place + 1}"))
        yield inside
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def host_name(place):
    return f"dlops{os.getpid()}-{place}"


def link(place, state):
    """Let the link of a host to the first one be up or down: what is sent meanwhile is lost, and nobody is told."""
    ip("-n", host_name(0), "link", "set", f"to{place}", state)


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)
