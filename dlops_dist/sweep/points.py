"""Which points a sweep tries: pure functions of its space, its seed, and of what was found."""

import itertools
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dlops_dist.config import Parameter, Point


def points_of(parameters: Sequence[Parameter], num_samples: int, seed: int) -> list[Point]:
    """Every combination of the grids with each of num_samples draws of the other parameters; none of them twice.

    More samples begin with the same points, and a parameter's draws do not depend on what else is searched.
    """
    drawn = [_draws(parameter, num_samples, seed) for parameter in parameters if parameter.kind != "grid"]
    grids = [[(p.name, value) for value in p.values] for p in parameters if p.kind == "grid"]
    points: list[Point] = []
    for sample in zip(*drawn, strict=True) if drawn else [()]:
        for combination in itertools.product(*grids):
            values = dict([*sample, *combination])
            point = {parameter.name: values[parameter.name] for parameter in parameters}
            if point not in points:
                points.append(point)
    return points


def _draws(parameter: Parameter, number: int, seed: int) -> list[tuple[str, object]]:
    generator = np.random.default_rng([seed, zlib.crc32(parameter.name.encode())])
    return [(parameter.name, parameter.at(part)) for part in generator.random(number)]


def suggest(parameters: Sequence[Parameter], gains: Sequence[tuple[Point, float]], seed: int) -> Point:
    """A point that may gain more than those before, a pure function of the arguments.

    By Optuna's tree-structured Parzen estimator (Bergstra et al. 2011).
    """
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions: dict[str, Any] = {
        p.name: FloatDistribution(*p.ends, log=p.kind == "log-uniform")
        if p.is_interval
        else CategoricalDistribution(p.values)
        for p in parameters
    }
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    for point, gain in gains:
        study.add_trial(optuna.trial.create_trial(params=point, distributions=distributions, value=gain))
    found = study.ask(distributions).params
    return {p.name: p.rounded(found[p.name]) if p.is_interval else found[p.name] for p in parameters}
