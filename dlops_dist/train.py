"""Train a model.

    python -m dlops_dist.train q1 --loss center            on a Ray cluster, or on this machine's cores
    python -m dlops_dist.train q1 --loss triplet --local   in one process
    python -m dlops_dist.train q1 --smoke                  a trial of a few seconds on generated images

The same command again goes on where it stopped. `TASK --help` lists every setting.
"""

import sys
from pathlib import Path
from typing import Any

from dlops_dist.command_line import read_settings
from dlops_dist.config import Q1, TASKS
from dlops_dist.errors import UserError, exit_code_of

SMOKE_SHARDS = {"train_per_class": 40, "test_per_class": 10}


def main() -> None:
    task, *arguments = sys.argv[1:] or ["--help"]
    if task in ("-h", "--help"):
        print(f"{__doc__}\nTasks: {', '.join(TASKS)}")
        return
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
    settings = read_settings(task, arguments)
    if settings.local and settings.workers not in (None, 1):
        raise UserError(f"workers: {settings.workers} processes need Ray; leave out --local")

    from dlops_dist.tracking import Console, check_wandb, test_figures

    check_wandb(settings.wandb)
    if settings.smoke:
        settings = with_smoke_shards(settings)
    with Console() as console:
        row = run(task, settings, console)
    print(f"result: {task} {settings.loss} after {row['epoch']} epochs: test {test_figures(row)}")


def run(task: str, settings: Q1, console: Any) -> dict[str, Any]:
    """Train here or on Ray. Returns the last row of metrics."""
    from dlops_dist.data.shards import read_manifest
    from dlops_dist.engine import fit, prepare
    from dlops_dist.engine.run_folder import RunFolder

    settings = prepare(task, settings)
    folder = RunFolder(Path(settings.runs_dir) / str(settings.name))
    with folder.held():
        folder.create(task, settings)
        if (row := folder.finished_row(settings, read_manifest(Path(settings.data.shards)).id)) is not None:
            console.say(f"run {folder.path} is complete; another --name trains anew")
            return row
        if not settings.local:
            from dlops_dist.ray_backend import train_on_ray

            return train_on_ray(task, settings, console)
        from dlops_dist.tracking import Wandb

        listeners = [console]
        if settings.wandb != "off":
            listeners.append(Wandb(settings.wandb, folder.path))
        return fit(settings, task=task, listeners=listeners)


def with_smoke_shards(settings: Q1) -> Q1:
    """Settings that read small generated shards, made under the runs folder unless they are there."""
    import tempfile

    from dlops_dist.data.pack import pack
    from dlops_dist.data.shapes import write_tiny_imagenet
    from dlops_dist.data.shards import MANIFEST
    from dlops_dist.data.sources import TinyImageNet

    out = Path(settings.runs_dir) / ".smoke-shards"
    if not (out / MANIFEST).is_file():
        with tempfile.TemporaryDirectory() as scratch:
            archive = Path(scratch) / "shapes.zip"
            write_tiny_imagenet(archive, **SMOKE_SHARDS)
            pack(TinyImageNet(archive), out, "shapes", workers=1)
    data = settings.data.model_copy(update={"shards": str(out)})
    return settings.model_copy(update={"data": data})


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
