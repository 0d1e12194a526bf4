"""What a run tells while it goes on. Listeners (console, W&B, a sweep) take what they need."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dlops_dist.errors import RunError, UserError


@dataclass(frozen=True)
class Started:
    """The run is about to take its first step."""

    folder: str
    settings: dict[str, Any]
    """Flat {dotted name: value}."""
    facts: dict[str, Any]
    """What was found out: samples, classes, parameters, workers, device."""
    epochs: int
    """Of all stages; so are steps."""
    steps: int
    stages: int
    first_step: int
    """0, or where a resumed run goes on."""


@dataclass(frozen=True)
class Stepped:
    """Some steps were taken; told about once a second."""

    epoch: int
    step: int
    """Of the run, both counted from 1."""
    step_in_epoch: int
    steps_per_epoch: int
    loss: float
    top1: float | None
    """Of the epoch so far, on this rank's samples; None where nothing is classified."""
    images_per_s: float


@dataclass(frozen=True)
class Logged:
    """Figures of one step were fetched; every `log_every` steps."""

    row: dict[str, Any]
    """As steps.jsonl holds it."""


@dataclass(frozen=True)
class EpochEnded:
    """An epoch was trained and evaluated."""

    row: dict[str, Any]
    """As metrics.jsonl holds it."""


@dataclass(frozen=True)
class Told:
    """What the run is doing, where that takes a while or was chosen by itself."""

    text: str


@dataclass(frozen=True)
class Warned:
    """Something that the user should know; the run goes on."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The run is complete."""


@dataclass(frozen=True)
class Failed:
    """A worker met a mistake, or a failed run, that a restart would only meet again; or has stopped as it was asked."""

    error: UserError | RunError | KeyboardInterrupt


@dataclass(frozen=True)
class Begun:
    """Ray's controller of the workers has started."""

    controller: Any
    """Its actor: whoever waits for the trainer waits for this."""


@dataclass(frozen=True)
class Placed:
    """A group of workers has begun, or begun again, on what was set aside for it."""

    placement_group: str
    """Its id."""


Event = Started | Stepped | Logged | EpochEnded | Told | Warned | Finished
Listener = Callable[[Event], None]
