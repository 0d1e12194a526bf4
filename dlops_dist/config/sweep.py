"""Settings of a sweep: those of its runs, which of them to search, and how."""

import importlib.util
import math
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, cast, get_args

from pydantic import AfterValidator, Field

from dlops_dist.config.run import MAY_CHANGE, Run
from dlops_dist.config.section import Section
from dlops_dist.errors import UserError

Value = bool | int | float | str
Point = dict[str, Value]
"""{dotted setting: value}"""
Kind = Literal["grid", "choice", "uniform", "log-uniform"]


@dataclass(frozen=True)
class Parameter:
    """A setting to search, written as 'optimizer.lr log-uniform 0.003 0.3'."""

    name: str
    kind: Kind
    values: tuple[Value, ...]
    """All there are; of uniform and log-uniform the two ends."""

    @classmethod
    def parse(cls, text: str) -> "Parameter":
        words, kinds = text.split(), get_args(Kind)
        if len(words) < 3 or words[1] not in kinds:
            raise ValueError(f"must read 'SETTING {'|'.join(kinds)} VALUE ...'")
        name, kind, *values = words
        parameter = cls(name.replace("-", "_"), kind, tuple(map(_value, values)))  # type: ignore[arg-type]
        if parameter.is_interval:
            ends = [v for v in parameter.values if not isinstance(v, bool | str) and math.isfinite(v)]
            above = 0.0 if kind == "log-uniform" else -math.inf
            if len(values) != 2 or len(ends) != 2 or not above < ends[0] < ends[1]:
                raise ValueError(f"needs two numbers{' above 0' * (kind == 'log-uniform')}, the lesser first")
        return parameter

    @property
    def is_interval(self) -> bool:
        return self.kind in ("uniform", "log-uniform")

    @property
    def ends(self) -> tuple[float, float]:
        """Of an interval."""
        low, high = self.values
        return float(low), float(high)

    def at(self, part: float) -> Value:
        """The value at a part in [0, 1) of the way through."""
        if not self.is_interval:
            return self.values[int(part * len(self.values))]
        low, high = self.ends
        return self.rounded(low * (high / low) ** part if self.kind == "log-uniform" else low + (high - low) * part)

    def rounded(self, value: float) -> float:
        """A value of an interval, to three digits."""
        low, high = self.ends
        return min(max(float(f"{value:.3g}"), low), high)


def _readable(text: str) -> str:
    Parameter.parse(text)
    return text


class Search(Section):
    """What a sweep adds to the settings of its runs."""

    place: ClassVar[str | None] = ""

    of: ClassVar[type[Run]]
    """The settings of a run."""
    space: tuple[Annotated[str, AfterValidator(_readable)], ...] = ()
    """Settings to search, each as 'SETTING KIND VALUE ...': 'optimizer.lr log-uniform 0.003 0.3' (or uniform) draws
    from an interval, 'optimizer.momentum choice 0.8 0.9' from a list; every combination of the lists given as grid is
    tried with each draw."""
    search: Literal["random", "optuna"] = "random"
    """random: draws keyed by --seed, known beforehand. optuna: each depends on what came of those before (needs
    'dlops_dist[optuna]'), so only --concurrency 1 gives the same ones again."""
    num_samples: int = Field(12, ge=1)
    """Draws; more of them later go on from the same ones."""
    seeds: int = Field(1, ge=1)
    """Runs of each point, with --seed, --seed + 1 and so on."""
    concurrency: int | None = Field(None, ge=1)
    """Trials at a time; by default as many as the cluster can hold."""
    workers: int | None = Field(None, ge=1)
    """Ray workers of each trial; by default 1."""
    smoke: bool = False
    """Two trials of a few seconds on generated images."""
    scheduler: Literal["none", "asha"] = "none"
    """asha ends the trials that do worst after 1, 3, 9 ... epochs: it saves time, and which trials those are depends on
    timing. (Population based training is not offered: it copies weights past Ray Train's checkpoints.)"""

    @property
    def parameters(self) -> list[Parameter]:
        return [Parameter.parse(text) for text in self.space]


class Sweep(Search, Run):
    """The settings of a sweep: what every run has, and the search. Those of a recipe's runs come with `sweep_type`."""


@cache
def sweep_type(settings: type[Run]) -> type[Sweep]:
    """The settings of a sweep over runs of these settings."""
    described = {
        "__doc__": f"Search the settings of: {settings.__doc__}",
        "__module__": settings.__module__,
        "of": settings,
    }
    return cast(type[Sweep], type("SweepSettings", (Search, settings), described))


def trial_settings(sweep: Sweep, point: Point, seed: int) -> Run:
    """The settings of the run of a point; refuses what `train` refuses."""
    values: dict[str, Any] = sweep.model_dump(include=set(sweep.of.model_fields)) | {"name": None, "seed": seed}
    for name, value in point.items():
        *sections, last = name.split(".")
        group, kind = values, sweep.of
        for section in sections:
            if not isinstance(group.setdefault(section, {}), dict):
                raise UserError(f"space: {name}: there is no such setting")
            group, kind = group[section], _type_of(kind, section)
        takes = _type_of(kind, last)
        group[last] = round(value) if isinstance(value, float) and int in (takes, *get_args(takes)) else value
    return sweep.of(**values)


def _type_of(section: Any, name: str) -> Any:
    """What a setting is annotated with; None where there is none of that name."""
    field = getattr(section, "model_fields", {}).get(name)
    return field and field.annotation


def check_sweep(sweep: Sweep) -> None:
    """Refuse, before anything is started, what would make a sweep useless or some of its trials mistakes."""
    _check_space(sweep)
    if sweep.search == "optuna":
        _check_optuna(sweep)
    if sweep.scheduler == "asha" and sweep.epochs < 2:
        raise UserError(f"scheduler: asha has nothing to end in trials of {sweep.epochs} epoch")
    if sweep.patience is not None:
        raise UserError(
            "patience: trials are compared after equally many epochs; --scheduler asha ends the worst early"
        )
    if not sweep.data.val_fraction:
        raise UserError("data.val_fraction: 0 holds nothing of train out to choose on; pass --data.val-fraction 0.1")
    if "://" in sweep.runs_dir:
        raise UserError(f"runs_dir: {sweep.runs_dir}: a sweep needs a folder that every node sees, not a URL")
    if sweep.local:
        raise UserError("local: a sweep runs on Ray, which starts on this machine by itself; leave out --local")
    if sweep.min_workers is not None and sweep.min_workers > (sweep.workers or 1):
        raise UserError(f"min_workers: {sweep.min_workers} is more than the {sweep.workers or 1} workers of a trial")


def _check_space(sweep: Sweep) -> None:
    names = [parameter.name for parameter in sweep.parameters]
    if not names:
        raise UserError("space: nothing to search; pass --space 'optimizer.lr log-uniform 0.003 0.3' ...")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"space: {name} is there twice")
        if name in MAY_CHANGE | {*Search.model_fields, "seed", "choose_by", "data.val_fraction"}:
            raise UserError(f"space: {name} cannot be searched: it does not make one point better than another")
    sweep.check_search(names)
    for parameter in sweep.parameters:
        for value in parameter.values:
            trial_settings(sweep, {parameter.name: value}, sweep.seed)


def _check_optuna(sweep: Sweep) -> None:
    if importlib.util.find_spec("optuna") is None:
        raise UserError("search: optuna is not installed; run pip install 'dlops_dist[optuna]'")
    grids = [parameter.name for parameter in sweep.parameters if parameter.kind == "grid"]
    if grids:
        raise UserError(f"space: {grids[0]} grid: optuna chooses each point itself; write choice for grid")


def word(value: Value) -> str:
    """A value as a space has it."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _value(text: str) -> Value:
    if text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text
