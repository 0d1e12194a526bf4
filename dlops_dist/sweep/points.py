"""The points of a sweep: a pure function of its space and seed."""

import itertools
import zlib
from collections.abc import Sequence

import numpy as np

from dlops_dist.config import Parameter, Point


def points_of(parameters: Sequence[Parameter], num_samples: int, seed: int) -> list[Point]:
    """Every combination of the grids with each of num_samples draws of the other parameters; none of them twice.

    More samples begin with the same points, and a parameter's draws do not depend on what else is searched.
    """
    drawn = [_draws(parameter, num_samples, seed) for parameter in parameters if parameter.kind != "grid"]
    grids = [[(p.name, value) for value in p.values] for p in parameters if p.kind == "grid"]
    names = [parameter.name for parameter in parameters]
    points: list[Point] = []
    for sample in zip(*drawn, strict=True) if drawn else [()]:
        for combination in itertools.product(*grids):
            values = dict([*sample, *combination])
            point = {name: values[name] for name in names}
            if point not in points:
                points.append(point)
    return points


def _draws(parameter: Parameter, number: int, seed: int) -> list[tuple[str, object]]:
    generator = np.random.default_rng([seed, zlib.crc32(parameter.name.encode())])
    return [(parameter.name, parameter.at(part)) for part in generator.random(number)]
