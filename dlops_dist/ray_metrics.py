"""Figures of a run for Prometheus, which asks each of Ray's nodes for them; launch/grafana.json shows them."""

from typing import Any

from dlops_dist.events import Event, Logged, Stepped

GAUGES = {
    "step": "Steps that were taken, over all stages",
    "loss": "Of the last step that was looked at",
    "lr": "Learning rate",
    "images_per_s": "Over all workers",
}
"""What the first worker tells, as dlops_dist_NAME."""
RESTARTS = "restarts"
"""What the controller tells: how often the workers were started again."""


def gauge(name: str, description: str, run: str) -> Any:
    """dlops_dist_NAME of a run, by whose name Prometheus tells it from others."""
    from ray.util.metrics import Gauge

    made = Gauge(f"dlops_dist_{name}", description=description, tag_keys=("run",))
    made.set_default_tags({"run": run})
    return made


class RayMetrics:
    """A listener that sets the gauges of a run."""

    def __init__(self, run: str) -> None:
        self._gauges = {name: gauge(name, description, run) for name, description in GAUGES.items()}

    def __call__(self, event: Event) -> None:
        match event:
            case Logged():
                self._set(event.row)
            case Stepped():
                self._set({"step": event.step, "loss": event.loss, "images_per_s": event.images_per_s})

    def _set(self, values: dict[str, Any]) -> None:
        for name, gauge in self._gauges.items():
            if values.get(name) is not None:
                gauge.set(values[name])
