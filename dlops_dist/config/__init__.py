"""Every setting of a run, typed and validated, which of them change the result, and the recipe they are for."""

from dlops_dist.config.recipe_file import (
    DEFAULT,
    SHIPPED,
    RecipeFile,
    check_task,
    is_loaded,
    load_recipe,
    recipe_from_source,
    stem_of,
)
from dlops_dist.config.run import LATER, MAY_CHANGE, Run, common_settings, default_name, flat, result_settings
from dlops_dist.config.sweep import Parameter, Point, Sweep, Value, check_sweep, sweep_type, trial_settings
from dlops_dist.config.training import Augment, Optimizer

__all__ = [
    "DEFAULT", "LATER", "MAY_CHANGE", "SHIPPED", "Augment", "Optimizer", "Parameter", "Point", "RecipeFile", "Run",
    "Sweep", "Value", "check_sweep", "check_task", "common_settings", "default_name", "flat", "is_loaded",
    "load_recipe", "recipe_from_source", "result_settings", "stem_of", "sweep_type", "trial_settings",
]  # fmt: skip
