"""Where a run is logged besides its rows: Weights & Biases, TensorBoard. What goes wrong there never ends a run."""

import hashlib
import netrc
import os
import re
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from pydantic import ValidationError

from dlops_dist.config import Run
from dlops_dist.config.run import wandb_of_environment
from dlops_dist.errors import UserError, first_line
from dlops_dist.events import EpochEnded, Event, Finished, Listener, Logged, Started
from dlops_dist.files import Folder

PROJECT = "dlops_dist"
TIMEOUT_S = 30.0
LONGEST_NAME = 128
"""Of a run or a group, as W&B's server takes it."""
Mode = Literal["online", "offline"]


def trackers_of(settings: Run, warn: Callable[[str], None]) -> list[Listener]:
    """Those that the settings ask for."""
    wandb = [Wandb(settings, warn)] if settings.wandb != "off" else []
    return [*wandb, *([TensorBoard(settings, warn)] if settings.tensorboard else [])]


def check_trackers(settings: Run) -> None:
    """Refuse, before anything is made, what cannot log or would be refused by W&B."""
    if settings.tensorboard and find_spec("tensorboard") is None:
        raise UserError("tensorboard: it is not installed; run pip install 'dlops_dist[tensorboard]'")
    if settings.wandb != "off":
        _check_wandb(online=settings.wandb == "online")


class TensorBoard:
    """Writes every epoch's and every logged step's figures into RUN/tensorboard."""

    def __init__(self, settings: Run, warn: Callable[[str], None]) -> None:
        self._place, self._warn = str(Folder(settings.runs_dir) / str(settings.name) / "tensorboard"), warn
        self._writer: Any = None

    def __call__(self, event: Event) -> None:
        try:
            self._log(event)
        except Exception as error:  # of each kind of storage
            self._writer = None
            self._warn(f"tensorboard: {first_line(error)}; nothing more is written")

    def _log(self, event: Event) -> None:
        match event:
            case Started():
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(self._place, purge_step=event.first_step + 1)  # later ones are done again
            case Logged() if self._writer is not None:
                self._add(of_step(event.row), event.row["step"])
            case EpochEnded() if self._writer is not None:
                self._add(event.row, event.row["step"])
                self._writer.flush()
            case Finished() if self._writer is not None:
                self._writer.close()

    def _add(self, row: dict[str, Any], step: int) -> None:
        for name, value in row.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)


class Wandb:
    """Logs settings and every epoch's figures to Weights & Biases; a resumed run goes on as the same run there.

    Runs of one sweep are one group. Whatever W&B refuses is told by `warn`, and never stops the run.
    """

    def __init__(self, settings: Run, warn: Callable[[str], None]) -> None:
        self._mode: Mode = "online" if settings.wandb == "online" else "offline"
        self._name, self._warn = str(settings.name), warn
        folder = Folder(settings.runs_dir) / self._name
        self._folder = folder.local or Path.cwd()
        self._run: Any = None

    def __call__(self, event: Event) -> None:
        try:
            self._log(event)
        except Exception as error:  # W&B raises many kinds; none is worth a run
            self._run = None
            _leave_out_wandb(error, self._warn)

    def _log(self, event: Event) -> None:
        match event:
            case Started():
                config = {**event.settings, **event.facts}
                self._run = _wandb_run(self._mode, self._folder, self._name, config, self._warn)
                self._run.define_metric("step/*", step_metric="step/step")
            case Logged() if self._run is not None:
                self._run.log(of_step(event.row), step=event.row["step"])
            case EpochEnded() if self._run is not None:
                figures = {k: v for k, v in event.row.items() if not isinstance(v, list)}
                self._run.log(figures, step=event.row["step"])
            case Finished() if self._run is not None:
                _finish(self._run, self._folder)


def of_step(row: dict[str, Any]) -> dict[str, Any]:
    """A step's figures, by names that are not those of epochs."""
    return {f"step/{name}": value for name, value in row.items()}


def log_pictures(mode: Mode, folder: Path, warn: Callable[[str], None], name: str = "summary") -> None:
    """Log what is in a folder's report to a run; by default, of a sweep, to one of its own in the sweep's group."""
    try:
        run = _wandb_run(mode, folder, name, {}, warn)
        _finish(run, folder)
    except Exception as error:
        _leave_out_wandb(error, warn)


def _finish(run: Any, folder: Path) -> None:
    """End a run at W&B by the pictures in its folder."""
    import wandb

    if pictures := sorted((folder / "report").glob("*.png")):
        run.log({path.stem: wandb.Image(str(path)) for path in pictures})
    run.finish()


def log_report(folder: Path, settings: Run, warn: Callable[[str], None]) -> None:
    """Log the pictures in a run's report to the run at W&B, where it was logged there."""
    mode = wandb_of_environment() if os.environ.get("WANDB_MODE") else settings.wandb
    if mode == "off":
        return
    try:
        _check_wandb(online=mode == "online")
    except UserError as error:
        warn(f"{error}; the pictures stay in {folder / 'report'}")
        return
    log_pictures(mode, folder, warn, str(settings.name))


def _wandb_run(mode: Mode, folder: Path, name: str, config: dict[str, Any], warn: Callable[[str], None]) -> Any:
    """A run at W&B, as its own variables say where they say something; kept for later where the server refuses it."""
    import wandb

    group = os.environ.get("WANDB_RUN_GROUP")
    settings = wandb.Settings(
        finish_timeout_raises=True,
        **_unless_set(console="off", silent=True, init_timeout=TIMEOUT_S, finish_timeout=TIMEOUT_S),
    )
    try:
        return wandb.init(
            name=fitting(os.environ.get("WANDB_NAME") or name), group=fitting(group) if group else None,
            config=config, mode=mode, settings=settings,
            **_unless_set(project=PROJECT, dir=folder, run_id=run_id(group, name), resume="allow"),
        )  # fmt: skip
    except wandb.Error as error:
        if mode == "offline":
            raise
        warn(f"wandb: {first_line(error)}; logged offline, and 'wandb sync {folder / 'wandb'}/offline-*' sends it")
        wandb.teardown()  # the name is in use till then
        return _wandb_run("offline", folder, name, config, warn)


def _unless_set(**ours: Any) -> dict[str, Any]:
    """What a variable of W&B's, WANDB_ and the name, does not say."""
    return {"id" if n == "run_id" else n: v for n, v in ours.items() if not os.environ.get(f"WANDB_{n.upper()}")}


def run_id(group: str | None, name: str) -> str:
    """Of a run at W&B, where it names an address and a file: the same again for the same run."""
    whole = "-".join(filter(None, (group, name)))
    return fitting(whole, re.sub(r"[^A-Za-z0-9._=-]", "_", whole))


def fitting(name: str, written: str | None = None) -> str:
    """A name that W&B's server takes, the same again for the same name, another for another.

    Args:
        written: how it may be written, if not as it is.
    """
    text = written or name
    if text == name and len(name) <= LONGEST_NAME:
        return name
    mark = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{text[: LONGEST_NAME - 1 - len(mark)]}-{mark}"


def _leave_out_wandb(error: Exception, warn: Callable[[str], None]) -> None:
    import wandb

    warn(f"wandb: {first_line(error)}; nothing more is logged, 'wandb sync' sends what was")
    with suppress(Exception):  # else what is left of it fails once more when the process ends
        wandb.teardown()


def _check_wandb(online: bool) -> None:
    """Refuse to be online where nobody is logged in, and variables that W&B does not take."""
    if online and not (os.environ.get("WANDB_API_KEY") or _key_in_netrc()):
        raise UserError("wandb: online needs a key; run 'wandb login', set WANDB_API_KEY, or pass --wandb offline")
    import wandb

    for name in filter(lambda name: name.startswith("WANDB_"), os.environ):
        try:
            wandb.Settings().update_from_env_vars({name: os.environ[name]})
        except Exception as error:  # W&B's own, or pydantic's, which begins by counting
            why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else first_line(error)
            raise UserError(f"{name}: {why}; change it, or pass --wandb off") from None


def _key_in_netrc() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
