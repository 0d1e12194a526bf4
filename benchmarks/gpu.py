"""What a GPU makes of this package, in ten minutes: its arithmetic against the CPU's, its waits, its speed.

    python benchmarks/gpu.py [--minutes 10] [--sections 1 2 3 ...] [--out FILE.jsonl]
    python benchmarks/gpu.py --shards shards/tiny-imagenet [--epochs 20] [--batch 128] [--losses ce triplet center]

Needs one GPU, neither Ray nor a network. Without a GPU the same runs in miniature on the CPU, in half a minute, and no
speed is judged. Each figure is printed once it is known, with its target where there is one; --out gets a line of JSON
for each. No section begins in the last 40 seconds. Exit code 1 if a target was missed.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the package is not installed

import gpu_checks
import gpu_speed
from gpu_tools import Row, Setup, default_numerics, failed

from dlops_dist.data.memory import keep_freed_memory

SECTIONS = {
    1: ("ceilings", gpu_speed.ceilings),
    2: ("correctness", gpu_checks.correctness),
    3: ("waits", gpu_checks.waits),
    4: ("determinism and resume", gpu_checks.determinism),
    5: ("readers", gpu_checks.readers),
    6: ("two ranks", gpu_checks.ranks),
    7: ("throughput", gpu_speed.throughput),
    8: ("data wait", gpu_speed.data_wait),
    9: ("profile", gpu_speed.profiled),
    10: ("losses", gpu_speed.losses),
    11: ("trend", gpu_checks.trend),
    12: ("whole runs", gpu_speed.whole_runs),
}
LAST_START_S, LAST_STEP_S = 40, 20
"""Before the end: after which no section begins, and no run goes on."""


def main() -> None:
    arguments = parsed()
    started = time.monotonic()
    end = started + 60 * arguments.minutes
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    keep_freed_memory()
    if device.type == "cpu":
        torch.set_num_threads(1)  # there is too little to share
    if arguments.out is not None:
        arguments.out.write_text("")
    for name, value in facts(device).items():
        print(f"{name:8}{value}", flush=True)
    rows, left_out = [], []
    with tempfile.TemporaryDirectory() as scratch:
        setup = Setup(device, Path(scratch), arguments, end - LAST_STEP_S)
        for number in arguments.sections:
            if time.monotonic() > end - LAST_START_S:
                left_out.append(number)
                continue
            rows += shown(number, setup)
    judged = [row.ok for row in rows if row.ok is not None]
    print(f"\n{time.monotonic() - started:.0f} s")
    print(f"result: {sum(judged)} of {len(judged)} checks kept, sections left out: {listed(left_out)}")
    sys.exit(int(not all(judged)))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    known = ", ".join(f"{number} {name}" for number, (name, _) in SECTIONS.items())
    parser.add_argument(
        "--sections", type=int, nargs="+", default=list(SECTIONS), choices=SECTIONS, metavar="N", help=known
    )
    parser.add_argument("--out", type=Path, help="file for the lines of JSON")
    parser.add_argument(
        "--no-deterministic", dest="deterministic", action="store_false",
        help="measure ours in sections 7 to 9 as with settings.deterministic off",
    )  # fmt: skip
    parser.add_argument("--shards", type=Path, help="packed images for section 12; by default few generated ones")
    parser.add_argument("--epochs", type=int, default=20, help="of each run on them")
    parser.add_argument("--batch", type=int, default=128, help="of each run on them")
    parser.add_argument(
        "--losses", nargs="+", choices=["ce", "triplet", "center"], default=["ce", "triplet", "center"],
        help="of section 12, one run each",
    )  # fmt: skip
    return parser.parse_args()


def facts(device: torch.device) -> dict[str, object]:
    """What the figures depend on."""
    gpu = device.type == "cuda"
    driver = printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else "none"
    return {
        "card": torch.cuda.get_device_name(device) if gpu else "none: in miniature on the CPU, one thread",
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version() if gpu else "none",
        "driver": driver,
        "Python": platform.python_version(),
        "commit": printed("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
    }


def printed(*command) -> str:
    """The first line that a command prints; 'unknown' where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def shown(number, setup: Setup) -> list[Row]:
    """The rows of a section, each printed once it is known."""
    name, section = SECTIONS[number]
    print(f"\n{number} {name}", flush=True)
    default_numerics(setup.device)
    rows, started = [], time.monotonic()
    for row in guarded(name, section(setup)):
        seconds, started = time.monotonic() - started, time.monotonic()
        show(row, seconds)
        keep(setup.arguments.out, number, row, seconds)
        rows.append(row)
    return rows


def guarded(name, rows):
    """Rows until one raises, and that as a row."""
    try:
        yield from rows
    except Exception as error:
        yield failed(name, error)


def show(row: Row, seconds) -> None:
    value = f"{row.value:.5g}" if isinstance(row.value, float) else str(row.value)
    verdict = {True: "kept", False: "MISSED", None: ""}[row.ok]
    print(f"  {row.name:52} {value:>12} {row.unit:14} {row.target:12} {verdict:6} {seconds:7.1f} s".rstrip())
    for line in row.details.splitlines():
        print(f"      {line}")
    sys.stdout.flush()


def keep(path: Path | None, number, row: Row, seconds) -> None:
    if path is None:
        return
    values = {"section": number, **row._asdict(), "seconds": round(seconds, 3)}
    if isinstance(row.value, float) and not math.isfinite(row.value):
        values["value"] = None
    with path.open("a") as file:
        file.write(json.dumps(values) + "\n")


def listed(numbers) -> str:
    return ", ".join(map(str, numbers)) or "none"


if __name__ == "__main__":
    main()
