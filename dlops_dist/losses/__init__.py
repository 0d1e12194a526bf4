"""The three losses of the study. They are pure: nothing here knows of ranks or processes.

Each gives `Terms(sum, count)` for some anchors among all samples; `forward` alone is the ordinary
single-process mean. `dlops_dist.distributed.objective` turns terms into what a rank back-propagates.
"""

from dlops_dist.losses.center import CenterLoss
from dlops_dist.losses.cross_entropy import CrossEntropyLoss
from dlops_dist.losses.terms import Terms
from dlops_dist.losses.triplet import TripletLoss

__all__ = ["CenterLoss", "CrossEntropyLoss", "Terms", "TripletLoss"]
