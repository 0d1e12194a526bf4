"""The next point of a sweep, by Optuna's tree-structured Parzen estimator (Bergstra et al. 2011)."""

from collections.abc import Sequence

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from dlops_dist.config import Parameter, Point


def suggest(parameters: Sequence[Parameter], scored: Sequence[tuple[Point, float]], seed: int) -> Point:
    """A point that may do better than those that were scored: a pure function of its arguments."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {parameter.name: _distribution(parameter) for parameter in parameters}
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    for point, score in scored:
        study.add_trial(optuna.trial.create_trial(params=point, distributions=distributions, value=score))
    found = study.ask(distributions).params
    return {p.name: p.rounded(found[p.name]) if p.is_interval else found[p.name] for p in parameters}


def _distribution(parameter: Parameter) -> BaseDistribution:
    if not parameter.is_interval:
        return CategoricalDistribution(parameter.values)
    return FloatDistribution(*parameter.ends, log=parameter.kind == "log-uniform")
