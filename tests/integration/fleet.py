"""A Ray cluster on this machine whose nodes may die, be cut off and come back."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack, nullcontext, suppress

import psutil
from command import wait_until
from ray_nodes import RAY, free_port, head_node, hosts, kill_all, link, node

SMALL_STORE = ("--object-store-memory", 10**8)
ASK = """
import json, sys, ray
ray.init(logging_level="ERROR", log_to_driver=False)
for _ in sys.stdin:
    print("alive", json.dumps([node["NodeID"] for node in ray.nodes() if node["Alive"]]), flush=True)
"""


def can_have_hosts():
    return os.geteuid() == 0 and shutil.which("ip") is not None


class Fleet:
    """A head, where commands run, and nodes of one CPU. Places of nodes are numbered from 1.

    Args:
        folder: of its files.
        nodes: besides the head.
        head_cpus: of the head.
        on_hosts: let each be on a host of its own, with an address and files of Ray's of its own.
    """

    def __init__(self, folder, nodes, head_cpus=1, on_hosts=False):
        self.folder, self.head_cpus, self.on_hosts = folder, head_cpus, on_hosts
        self.places = range(1, nodes + 1)
        self._hosts, self._all, self._nodes, self._ids = ExitStack(), ExitStack(), {}, {}

    def __enter__(self):
        one = [((), "127.0.0.1")] * (len(self.places) + 1)
        self._at = self._hosts.enter_context(hosts(self.folder, len(one)) if self.on_hosts else nullcontext(one))
        self.begin()
        return self

    def __exit__(self, *_):
        self.end()
        self._hosts.close()

    @property
    def within(self):
        """Prefix of a command on the head's host."""
        return self._at[0][0]

    def begin(self):
        """Start all nodes."""
        within, address = self._at[0]
        self.cluster = self._all.enter_context(head_node(self.folder, self.head_cpus, within, address, SMALL_STORE))
        self._asked = subprocess.Popen(
            [*within, sys.executable, "-c", ASK], env={**os.environ, **self.cluster}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._all.callback(self._asked.wait)
        self._all.callback(self._asked.kill)
        for place in self.places:
            self.add(place)

    def end(self):
        """Kill all nodes, the head among them."""
        self._all.close()

    def alive(self):
        """Ids of the nodes that the cluster has."""
        self._asked.stdin.write("\n")
        self._asked.stdin.flush()
        answer = next(line for line in self._asked.stdout if line.startswith("alive "))  # Ray prints, too
        return set(json.loads(answer.removeprefix("alive ")))

    def add(self, place):
        """Start a node, until the cluster knows it."""
        before, (within, address) = self.alive(), self._at[place]
        options = ["--address", self.cluster["RAY_ADDRESS"], "--num-cpus", 1, "--node-ip-address", address]
        options += [*SMALL_STORE, "--dashboard-agent-listen-port", free_port()]
        self._nodes[place] = self._all.enter_context(node(self.cluster, *options, within=within))
        assert wait_until(lambda: self.alive() - before, 300, every_s=0.2), f"node {place} does not begin"
        (self._ids[place],) = self.alive() - before

    def kill(self, place):
        """A node, with all that runs on it."""
        kill_all(self._nodes[place])

    def lives(self, place):
        """Whether a node has not ended by itself, as one does that Ray has taken for dead."""
        return self._nodes[place].poll() is None

    def drain(self, place, seconds):
        """Let Ray say that a node is going to be taken away in so many seconds."""
        notice = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--node-id"]
        notice += [self._ids[place], "--deadline-remaining-seconds", str(seconds)]
        command = [*self.within, RAY, "drain-node", "--address", self.cluster["RAY_ADDRESS"], *notice]
        subprocess.run(command, env={**os.environ, **self.cluster}, check=True)

    def cut(self, place):
        """Let nothing pass between a node's host and the others; nobody is told."""
        link(place, "down")

    def mend(self, place):
        link(place, "up")


def ray_processes(title):
    """Ray's processes of this kind, on the nodes that this process has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found
