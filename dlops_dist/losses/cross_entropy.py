"""Cross-entropy with label smoothing."""

import torch
from torch import Tensor, nn

from dlops_dist.losses.terms import Terms, at_least_float32, checked_labels


class CrossEntropyLoss(nn.Module):
    """Cross-entropy of logits z (N, C) against labels y (N,), in nats.

        l_i = log sum_j exp(z_ij) - (1 - s) z_iy - s/C sum_j z_ij,    L = 1/N sum_i l_i

    s is `label_smoothing` (Szegedy et al. 2016, Rethinking the Inception Architecture, section 7). Of labels that are
    mixed, parts t (N, C) that add up to 1, z_iy is sum_j t_ij z_ij.
    """

    reads, sees = "logits", "own"
    takes_mixed = True

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
        self.label_smoothing = label_smoothing

    def terms(self, logits: Tensor, labels: Tensor) -> Terms:
        """Sum of l_i and N."""
        logits, mixed = at_least_float32(logits), labels.is_floating_point() and labels.shape == logits.shape
        labels = labels if mixed else checked_labels(labels, *logits.shape)
        highest = logits.detach().amax(dim=1, keepdim=True)
        shifted = logits - highest  # the largest is 0: exp never overflows
        log_sum = shifted.exp().sum(dim=1).log()
        target = (labels * shifted).sum(dim=1) if mixed else shifted.gather(1, labels[:, None]).squeeze(1)
        if self.label_smoothing:
            target = torch.lerp(target, shifted.mean(dim=1), self.label_smoothing)
        return Terms((log_sum - target).sum(), len(logits))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.terms(logits, labels).mean()
