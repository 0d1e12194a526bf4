"""Training: one step, the epoch, exact evaluation, checkpoints. Runs in one process or in each worker of a group."""

from dlops_dist.engine.fit import fit
from dlops_dist.engine.prepare import prepare

__all__ = ["fit", "prepare"]
