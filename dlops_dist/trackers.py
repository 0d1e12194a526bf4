"""Where a run is logged besides its own folder: Weights & Biases. Whatever goes wrong there never ends a run."""

import hashlib
import netrc
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from pydantic import ValidationError

from dlops_dist.config import Settings
from dlops_dist.engine.events import EpochEnded, Event, Finished, Started
from dlops_dist.errors import UserError, first_line
from dlops_dist.files import Folder

PROJECT = "dlops_dist"
TIMEOUT_S = 30.0
LONGEST_NAME = 128
"""Of a run or a group, as W&B's server takes it."""
Mode = Literal["online", "offline"]


class Wandb:
    """Logs settings and every epoch's figures to Weights & Biases; a resumed run goes on as the same run there.

    Runs of one sweep are one group. Whatever W&B refuses is told by `warn`, and never stops the run.
    """

    def __init__(self, settings: Settings, warn: Callable[[str], None]) -> None:
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
            case EpochEnded() if self._run is not None:
                figures = {k: v for k, v in event.row.items() if not isinstance(v, list)}
                self._run.log(figures, step=event.row["step"])
            case Finished() if self._run is not None:
                self._run.finish()


def log_pictures(mode: Mode, folder: Path, paths: Sequence[Path], warn: Callable[[str], None]) -> None:
    """Log pictures of a sweep as a run of its own in the sweep's group."""
    import wandb

    try:
        run = _wandb_run(mode, folder, "summary", {}, warn)
        run.log({path.stem: wandb.Image(str(path)) for path in paths})
        run.finish()
    except Exception as error:
        _leave_out_wandb(error, warn)


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
    readable = "-".join(filter(None, (group, name)))
    allowed = re.sub(r"[^A-Za-z0-9._=-]", "_", readable)
    return allowed if allowed == readable and len(readable) <= LONGEST_NAME else _cut(allowed, readable)


def fitting(name: str) -> str:
    """A name that W&B's server takes, the same again for the same name."""
    return name if len(name) <= LONGEST_NAME else _cut(name, name)


def _cut(text: str, whole: str) -> str:
    """Short enough, and still another for another whole."""
    mark = hashlib.sha256(whole.encode()).hexdigest()[:8]
    return f"{text[: LONGEST_NAME - 1 - len(mark)]}-{mark}"


def _leave_out_wandb(error: Exception, warn: Callable[[str], None]) -> None:
    import wandb

    warn(f"wandb: {first_line(error)}; nothing more is logged, 'wandb sync' sends what was")
    with suppress(Exception):  # else what is left of it fails once more when the process ends
        wandb.teardown()


def check_wandb(settings: Settings) -> None:
    """Refuse, before anything is made, `online` where nobody is logged in, and variables that W&B does not take."""
    if settings.wandb == "off":
        return
    if settings.wandb == "online" and not (os.environ.get("WANDB_API_KEY") or _key_in_netrc()):
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
