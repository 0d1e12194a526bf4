"""Every setting of a run, typed and validated, and which of them change the result."""

from dlops_dist.config.sweep import SWEEPS, Parameter, Point, Sweep, Value, check_sweep, trial_settings
from dlops_dist.config.tasks import (
    MAY_CHANGE,
    Q1,
    Q2,
    SMOKE,
    TASKS,
    Run,
    Settings,
    default_name,
    flat,
    result_settings,
)
from dlops_dist.config.training import Augment, Optimizer

__all__ = [
    "MAY_CHANGE", "Q1", "Q2", "SMOKE", "SWEEPS", "TASKS", "Augment", "Optimizer", "Parameter", "Point", "Run",
    "Settings", "Sweep", "Value", "check_sweep", "default_name", "flat", "result_settings", "trial_settings",
]  # fmt: skip
