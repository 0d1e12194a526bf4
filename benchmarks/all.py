"""All benchmarks in turn, each a process of its own: a table of what they print, with the machine and its load.

    python benchmarks/all.py [--only step losses] [--shards DIR] [--out FILE.jsonl] [--quick]

Takes half an hour or more on two cores: name those that matter. A machine that has other work to do is named as busy,
and what is timed on it says little. --shards are packed images, for those that train on some; by default generated
ones. --quick runs all in miniature: whether they work, not how fast. --out gets a line of JSON for each. Exit code 1
where one failed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

QUICK = {
    "autoencoder": ["--batch", "8", "--steps", "1", "--runs", "1", "--only", "layer 6"],
    "bare_loop": ["--epochs", "2"],
    "checkpoints": ["--every", "1", "--steps", "2", "--runs", "1"],
    "data": ["--images", "256", "--runs", "1"],
    "first_step": ["--runs", "1"],
    "gpu": ["--sections", "1"],
    "kernels": ["--classes", "10", "--batch", "2"],
    "losses": ["--runs", "1"],
    "outside": ["--epochs", "1"],
    "recovery": ["--runs", "1"],
    "step": ["--batch", "8", "--steps", "1", "--runs", "1"],
    "wire": ["--batch", "64", "--steps", "1"],
    "workers": ["--batch", "16", "--runs", "1"],
}
"""{benchmark: what makes it small}"""
ON_SHARDS = ("bare_loop", "outside")
BUSY = 0.1
"""Part of the machine at work for others, above which it is called busy."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=QUICK, default=list(QUICK), metavar="NAME", help=", ".join(QUICK))
    parser.add_argument("--shards", type=Path, help="packed images for bare_loop and outside")
    parser.add_argument("--out", type=Path, help="file for the lines of JSON")
    parser.add_argument("--quick", action="store_true", help="in miniature: no measurement")
    arguments = parser.parse_args()
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    table = Table("benchmark", "printed", "seconds", "busy before", show_lines=True)
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.only:
            shards = [str(arguments.shards or generated(Path(scratch), arguments.quick))] if name in ON_SHARDS else []
            row = benchmark(name, [*shards, *(QUICK[name] if arguments.quick else [])])
            table.add_row(name, "\n".join(row["printed"]), f"{row['seconds']:.0f}", f"{row['busy']:.0%}")
            failed += [name] * (row["code"] != 0)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps({**row, "quick": arguments.quick, **facts}) + "\n")
    Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False).print(table)
    print(f"failed: {', '.join(failed) or 'none'}")
    sys.exit(bool(failed))


def benchmark(name: str, arguments: list[str]) -> dict[str, object]:
    """Run one, and show what it prints as it does."""
    busy = psutil.cpu_percent(interval=1) / 100
    warning = ": times will say little" if busy > BUSY else ""
    print(f"\n{name}: the machine is {busy:.0%} busy before it{warning}", flush=True)
    started, printed = time.monotonic(), []
    command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            print(f"  {line}", end="", flush=True)
            printed.append(line.rstrip())
    seconds = round(time.monotonic() - started, 1)
    shown = {"benchmark": name, "arguments": arguments, "code": process.returncode, "seconds": seconds}
    return {**shown, "busy": busy, "load": os.getloadavg()[0], "printed": printed}


def generated(folder: Path, quick: bool) -> Path:
    """Shards of 64x64 images, packed once."""
    if not (folder / "shapes").exists():
        command = [
            sys.executable,
            "-m",
            "dlops_dist.shard",
            "shapes",
            "--out",
            str(folder),
            *["--limit", "160"] * quick,
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "shapes"


def machine() -> dict[str, object]:
    """What figures depend on."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "CPU": models[0].partition(": ")[2] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "ray": version("ray"),
        "Python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }


if __name__ == "__main__":
    main()
