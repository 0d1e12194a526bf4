"""Kills at random what trains, packs and searches, by a seed, for a given time: all end with the undisturbed bits.

    python tests/soak.py [--seed 0] [--minutes 120] [--kinds process packing ...]

A line for each kill, one for what came of each run, and a count at the end, also after Ctrl-C. Exit code 1 where one
ended otherwise than what nothing disturbed; its folder is kept.
"""

import argparse
import itertools
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent / "integration"))
from command import TINY, last_checkpoint, last_step, lines_of, run, start
from fleet import Fleet, ray_processes
from ray_nodes import kill_all
from test_shard import sharers
from test_torchrun import torchrun

from dlops_dist.data.pack import pack
from dlops_dist.data.shapes import write_stl10, write_tiny_imagenet
from dlops_dist.data.sources import STL10, TinyImageNet

DRAWN = {"process": 8, "packing": 8, "torchrun": 4, "worker": 3, "driver": 2, "node": 1, "sweep": 2}
"""How often a kind of kill is drawn."""
RUNS = {
    "ce": ("q1", "--loss", "ce", "--ema-decay", "0.95", "--augment.mixup", "0.2", "--epochs", "10"),
    "triplet": ("q1", "--loss", "triplet", "--optimizer.lr", "0.002", "--epochs", "10"),
    "center": ("q1", "--loss", "center", "--augment.flip", "--augment.crop-padding", "2", "--epochs", "10"),
    "long": ("q1", "--loss", "center", "--epochs", "60"),
    "q2": ("q2", "--model.layers", "12", "9", "5", "--model.code-layer", "9", "--pretrain.epochs", "16", "--epochs",
           "16", "--finetune"),
}  # fmt: skip
SHORT = ("ce", "triplet", "center", "q2")
PATIENCE_S = 600
"""How long the next step is waited for: other work may be heavy."""
BLIND = 0.25
"""How many kills come after a random time, and may fall into a start; the others come after a random step."""


class Soak:
    """What it kills with, what it has killed, what came of it."""

    def __init__(self, scratch, seed):
        self.scratch, self.random = scratch, random.Random(seed)
        self.kills, self.ended, self.started = Counter(), Counter(), time.monotonic()
        self.numbers, self.references = itertools.count(1), {}
        self.machines, self.fleet = ExitStack(), None
        self.prepare()

    def prepare(self):
        """Data for all runs."""
        write_tiny_imagenet(self.scratch / "shapes.zip", train_per_class=24, test_per_class=6, size=32)
        source = TinyImageNet(self.scratch / "shapes.zip")
        pack(source, self.scratch / "q1", "shapes", shard_size=100, workers=1)
        write_stl10(self.scratch / "stl10_binary", train_per_class=8, test_per_class=3, num_unlabeled=45)
        pack(STL10(self.scratch), self.scratch / "q2", "shapes-stl10", shard_size=100, workers=1)
        write_tiny_imagenet(self.scratch / "many.zip", train_per_class=200, test_per_class=40, size=16)

    def say(self, text):
        print(f"{time.monotonic() - self.started:6.0f} s  {text}", flush=True)

    def count(self):
        kinds = ", ".join(f"{kind} {number}" for kind, number in sorted(self.kills.items()))
        good, all_ended = self.ended["equal"], self.ended.total()
        return f"{self.kills.total()} kills ({kinds}); {good} of {all_ended} runs ended with the undisturbed bits"

    def one(self, kind):
        """Kills of a kind in one run."""
        folder = self.scratch / f"{next(self.numbers):04}-{kind}"
        folder.mkdir()
        try:
            how = getattr(self, kind)(folder)
        except Exception as error:  # told, and the others go on
            how = f"{type(error).__name__}: {error}"
        self.ended["equal" if how is None else "other"] += 1
        self.say(f"{folder.name} ended {'with the undisturbed bits' if how is None else f'OTHERWISE: {how}'}")
        if how is None:
            shutil.rmtree(folder, ignore_errors=True)

    # what is trained, and what it is compared with

    def training(self, name, folder):
        """The command of a run, without where its workers are."""
        task, *arguments = RUNS[name]
        data = ["--data.shards", self.scratch / task, "--data.cache-dir", folder / "cache"]
        often = ["--log-every", "1", "--checkpoint-every", str(self.random.randint(1, 12))]
        tiny = TINY[2:] if task == "q1" else ["--global-batch-size", "22"]  # without its cache: one for each run
        return ["train", task, *tiny, *arguments, *data, *often, "--blocks", "4", "--name", "run", "--runs-dir", folder]

    def compared(self, name, folder):
        """None where a run ended as the one that nothing disturbed."""
        if name not in self.references:
            whole = self.scratch / f"whole-{name}"
            self.checked(run(*self.training(name, whole), "--local", timeout_s=PATIENCE_S))
            self.references[name] = ended(whole / "run")
        return None if ended(folder / "run") == self.references[name] else "other bits, or steps"

    @staticmethod
    def checked(result):
        code, output = result
        if code:
            raise RuntimeError(f"exit code {code}: {' | '.join(output.splitlines()[-6:])}")

    # when it is killed

    def wait_for_moment(self, process, progress):
        """Until a random moment of what is under way. Returns whether there is still something to kill."""
        deadline, before = time.monotonic() + PATIENCE_S, progress()
        if self.random.random() < BLIND:
            moment, wanted = time.monotonic() + self.random.uniform(0, 10), None
        else:
            moment, wanted = deadline, before + self.random.randint(1, 12)
        while process.poll() is None and time.monotonic() < moment and (wanted is None or progress() < wanted):
            time.sleep(0.005)
        if time.monotonic() > deadline:
            raise TimeoutError(f"no progress from {before} in {PATIENCE_S} s")
        time.sleep(self.random.uniform(0, 0.05))
        return process.poll() is None

    def command_killed(self, kind, command, progress, env=None, others=lambda process: []):
        """Kill a command, or one of its `others`, some times; the last time, let it end."""
        for _ in range(self.random.randint(2, 5)):
            process = start(*command, env=env or {})
            with under_way(process) as lines:
                begun = time.monotonic()
                if not self.wait_for_moment(process, progress):
                    self.checked((process.returncode, "\n".join(lines)))
                    break
                self.kill(process, kind, begun, progress, lambda it: [it, it, *others(it)])
                process.wait(timeout=PATIENCE_S)
        self.checked(run(*command, env=env or {}, timeout_s=PATIENCE_S))

    def kill(self, process, kind, begun, progress, victims=lambda process: [process]):
        with suppress(psutil.NoSuchProcess, IndexError):  # it ended meanwhile, or has not begun
            victim = self.random.choice(victims(process))
            victim.kill()
            self.killed(kind, f"process {victim.pid}", begun, progress)

    def killed(self, kind, what, begun, progress):
        self.kills[kind] += 1
        when = f"{time.monotonic() - begun:.1f} s after it began or the last one, at {progress()}"
        self.say(f"kill {self.kills.total():4}  {kind}: {what}, {when}")

    # kinds

    def process(self, folder):
        """A run in one process."""
        name = self.random.choice(SHORT)
        command = [*self.training(name, folder), "--local"]
        self.command_killed("process", command, lambda: last_step(folder / "run"))
        return self.compared(name, folder)

    def packing(self, folder):
        """A packing: its process, or one that shares the work."""
        out = folder / "tiny-imagenet"
        options = ["--source", self.scratch / "many.zip", "--shard-size", "5", "--limit", "1500", "--workers", "2"]
        command = ["shard", "tiny-imagenet", *options]
        progress = lambda: len(list(out.glob(".*.done")))  # noqa: E731
        self.command_killed("packing", [*command, "--out", folder], progress, others=sharers)
        if "packing" not in self.references:
            self.checked(run(*command, "--out", self.scratch / "packed", timeout_s=PATIENCE_S))
            self.references["packing"] = contents(self.scratch / "packed/tiny-imagenet")
        return None if contents(out) == self.references["packing"] else "other bytes"

    def torchrun(self, folder):
        """A process that torchrun started."""
        name = self.random.choice(SHORT)
        process = torchrun(*self.training(name, folder)[1:], restarts=99)
        self.some_killed("torchrun", process, folder, lambda it: psutil.Process(it.pid).children())
        return self.compared(name, folder)

    def worker(self, folder):
        """A worker of Ray's."""
        name = self.random.choice(SHORT)
        process = self.on_ray(name, folder, "--workers", str(self.random.randint(2, 3)), "--max-restarts", "99")
        self.some_killed("worker", process, folder, lambda _: ray_processes("RayTrainWorker"))
        return self.compared(name, folder)

    def some_killed(self, kind, process, folder, victims):
        """Kill what works for a command, which goes on by itself."""
        with under_way(process) as lines:
            for _ in range(self.random.randint(2, 4)):
                begun = time.monotonic()
                if not self.wait_for_moment(process, lambda: last_step(folder / "run")):
                    break
                self.kill(process, kind, begun, lambda: last_step(folder / "run"), victims)
            process.wait(timeout=PATIENCE_S)
        self.checked((process.returncode, "\n".join(lines)))

    def driver(self, folder):
        """The command that trains on Ray; each time on another number of workers."""
        name = self.random.choice(SHORT)
        command, progress = self.training(name, folder), lambda: last_step(folder / "run")
        for _ in range(self.random.randint(1, 3)):
            self.on_ray_complete()
            process = start(*command, "--workers", str(self.random.randint(1, 3)), env=self.fleet.cluster)
            with under_way(process) as lines:
                begun = time.monotonic()
                if not self.wait_for_moment(process, progress):
                    self.checked((process.returncode, "\n".join(lines)))
                    break
                self.kill(process, "driver", begun, progress)
        self.checked(run(*command, "--workers", "2", env=self.fleet.cluster, timeout_s=PATIENCE_S))
        return self.compared(name, folder)

    def node(self, folder):
        """A node, which comes back while the others go on."""
        process = self.on_ray("long", folder, "--workers", "3", "--min-workers", "1", "--max-restarts", "99")
        with under_way(process) as lines:
            for _ in range(2):
                begun = time.monotonic()
                if not self.wait_for_moment(process, lambda: last_step(folder / "run")):
                    break
                self.fleet.kill(1)
                self.killed("node", "a node", begun, lambda: last_step(folder / "run"))
                time.sleep(self.random.uniform(0, 40))
                self.fleet.add(1)
            process.wait(timeout=PATIENCE_S)
        self.checked((process.returncode, "\n".join(lines)))
        return self.compared("long", folder)

    def sweep(self, folder):
        """The command of a sweep, or the process of a trial."""
        self.on_ray_complete()
        space = ["--space", "optimizer.lr grid 0.02 0.01", "--epochs", "4", "--checkpoint-every", "3"]
        options = ["--data.shards", self.scratch / "q1", "--data.val-fraction", "0.25", "--blocks", "4", "--log-every"]
        command = ["tune", "q1", *TINY[2:], *space, *options, "1", "--name", "sweep", "--runs-dir", folder]
        command += ["--data.cache-dir", folder / "cache"]
        sweep = folder / "sweep"

        def progress():
            return sum(last_step(file.parent) for file in sweep.glob("*/steps.jsonl"))

        self.command_killed(
            "sweep", command, progress, self.fleet.cluster, others=lambda process: ray_processes("ImplicitFunc")
        )
        trials = [file.parent for file in sweep.glob("*/config.yaml")]
        for trial in trials:
            if trial.name not in self.references:
                whole = self.scratch / f"whole-{trial.name}"
                config = ["--config", trial / "config.yaml", "--name", "run", "--runs-dir", whole]
                self.checked(run("train", "q1", *config, "--local", timeout_s=PATIENCE_S))
                self.references[trial.name] = ended(whole / "run")
        same = [ended(trial) == self.references[trial.name] for trial in trials]
        return None if same == [True, True] else f"{same} of the trials equal"

    # Ray

    def on_ray(self, name, folder, *options):
        """A run, begun."""
        self.on_ray_complete()
        return start(*self.training(name, folder), *options, env=self.fleet.cluster)

    def on_ray_complete(self):
        """A head of two CPUs and a node of one, all there."""
        if self.fleet is None:
            self.fleet = self.machines.enter_context(Fleet(self.scratch, 1, head_cpus=2))
        elif len(self.fleet.alive()) < 2:
            self.fleet.add(1)


@contextmanager
def under_way(process):
    """What a process prints; it does not outlive this."""
    try:
        yield lines_of(process)
    finally:
        kill_all(process)


def ended(run_folder):
    """A run's last checkpoint, and each step with its loss."""
    steps = [json.loads(line) for line in (run_folder / "steps.jsonl").read_text().splitlines()]
    return *last_checkpoint(run_folder), [(row["step"], row["loss"]) for row in steps]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop(*_):
    raise KeyboardInterrupt


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--kinds", nargs="+", choices=DRAWN, default=list(DRAWN))
    asked = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    scratch = Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(scratch, asked.seed)
    try:
        while time.monotonic() - soak.started < 60 * asked.minutes:
            soak.one(soak.random.choices(asked.kinds, [DRAWN[kind] for kind in asked.kinds])[0])
    except KeyboardInterrupt:
        pass
    finally:
        soak.machines.close()
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    soak.say(soak.count())
    bad = soak.ended["other"]
    if bad:
        soak.say(f"what ended otherwise is in {scratch}")
    else:
        shutil.rmtree(scratch, ignore_errors=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
