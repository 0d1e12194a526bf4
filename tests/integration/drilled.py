"""A run that something happens to, and the same one undisturbed."""

import json
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from command import TINY, last_step, lines_of, start, wait_until

from dlops_dist.command_line import read_settings
from dlops_dist.engine import fit, prepare
from dlops_dist.events import Logged

TRAINED = [*TINY, "--loss", "center", "--blocks", "4", "--epochs", "4000", "--log-every", "1", "--name", "run"]
TRAINED += ["--exactness", "bits"]
SAMPLES = 20
"""In each step."""
PATIENCE_S = 900


class Drilled:
    """A run on a fleet that something happens to."""

    def __init__(self, fleet, shards, runs, *options):
        self.fleet, self.folder = fleet, runs / "run"
        self.command = [*command(shards), "--checkpoint-every", "5", "--max-restarts", "20", *options]
        self.command += ["--runs-dir", runs]
        self.told, self.printed = [], []
        """What its commands before, and the one under way, have printed."""

    def begin(self):
        """Start the command, once more perhaps."""
        self.told = self.lines
        self.process = start(*self.command, env=self.fleet.cluster, within=self.fleet.within)
        self.printed = lines_of(self.process)

    @property
    def lines(self):
        return self.told + self.printed

    @property
    def step(self):
        return last_step(self.folder)

    @property
    def workers(self):
        """How many each beginning had, in turn."""
        return [int(number) for line in self.lines for number in re.findall(r" (\d) workers? on cpu", line)]

    def trains(self, *workers):
        """Wait until the last beginnings were with so many workers, in turn, and a step was taken since."""
        assert wait_until(lambda: self.workers[-len(workers) :] == [*workers], PATIENCE_S), "\n".join(self.lines)
        step = self.step
        assert wait_until(lambda: self.step > step, PATIENCE_S), "\n".join(self.lines)

    def stands_still(self, event: Callable[[], object], is_over: Callable[[], bool] | None = None):
        """The longest time without a step that was not taken before, from an event till one after it is over: by
        default, till the run has begun once more.
        """
        beginnings, best, since, longest = len(self.workers), self.step, time.monotonic(), 0.0
        is_over = is_over or (lambda: len(self.workers) > beginnings)
        deadline, happened = since + PATIENCE_S, Future()
        threading.Thread(target=_run, args=(event, happened), daemon=True).start()
        while True:
            over = happened.done() and is_over()
            if happened.done():
                happened.result()
            if (step := self.step) > best:
                now = time.monotonic()
                best, since, longest = step, now, max(longest, now - since)
                if over:
                    return longest
            assert time.monotonic() < deadline, "\n".join(self.lines)
            time.sleep(0.03)

    def ends(self):
        """Wait until the command has ended by itself. Returns its exit code and its last line."""
        self.process.wait(timeout=PATIENCE_S)
        return self.process.returncode, self.printed[-1] if self.printed else ""

    def stop(self):
        """Stop it, the step saved. Returns the step."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=PATIENCE_S)
        assert self.process.returncode == 130, "\n".join(self.lines)
        return self.step


def _run(event, outcome):
    try:
        outcome.set_result(event())
    except BaseException as error:
        outcome.set_exception(error)


def lost_or_repeated(run_folder):
    """Samples of steps that are not there, or twice."""
    steps = [json.loads(line)["step"] for line in (run_folder / "steps.jsonl").read_text().splitlines()]
    return SAMPLES * (len(set(range(1, steps[-1] + 1)) ^ set(steps)) + len(steps) - len(set(steps)))


def command(shards):
    """That all drills run, without what is no part of the result."""
    return ["train", "q1", "--data.shards", shards, *TRAINED]


def undisturbed(shards, steps, folder):
    """{step: (name, bytes) of its checkpoint} of the same run in this process, which nothing disturbs."""
    at, found = [0], {}
    arguments = [str(part) for part in (*command(shards)[2:], "--runs-dir", folder)]
    if not steps:
        return found

    def seen(event):
        if isinstance(event, Logged):
            at[0] = event.row["step"]

    def look():
        for step in steps - found.keys():
            file = folder / f"run/checkpoints/step-{step:09d}.pt"
            if file.exists():
                found[step] = file.name, file.read_bytes()

    def is_wanted():
        look()
        return at[0] in steps

    with suppress(KeyboardInterrupt):
        settings = prepare("q1", read_settings("q1", arguments))
        fit(settings, listeners=[seen], stop=lambda: at[0] >= max(steps), save=is_wanted)
    look()
    return found
