"""The study's three losses, the error of a reconstruction, and anybody's. They are pure: nothing here knows of ranks.

Each gives `Terms(sum, count)` for some anchors among all samples; `forward` alone is the ordinary
single-process mean. `dlops_dist.distributed.objective` turns terms into what a rank back-propagates.
"""

from dlops_dist.losses.center import CenterLoss
from dlops_dist.losses.cross_entropy import CrossEntropyLoss
from dlops_dist.losses.reconstruction import ReconstructionLoss
from dlops_dist.losses.terms import Terms
from dlops_dist.losses.triplet import TripletLoss
from dlops_dist.losses.whole import Whole

__all__ = ["CenterLoss", "CrossEntropyLoss", "ReconstructionLoss", "Terms", "TripletLoss", "Whole"]
