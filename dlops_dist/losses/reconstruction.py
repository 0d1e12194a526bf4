"""The error of a reconstruction."""

from torch import Tensor, nn
from torch.nn import functional as F

from dlops_dist.losses.terms import Terms, at_least_float32


class ReconstructionLoss(nn.Module):
    """Mean squared error of reconstructions x' (N, D) of inputs x (N, D).

        L = 1/(N D) sum_i ||x'_i - x_i||^2

    A sample's terms are as many as its inputs, so N D counts them.
    """

    reads, sees = "reconstructions", "own"

    def terms(self, reconstructions: Tensor, inputs: Tensor) -> Terms:
        """Sum of (x'_ij - x_ij)^2 and N D."""
        if reconstructions.shape != inputs.shape:
            raise ValueError(f"reconstructions {tuple(reconstructions.shape)} are of inputs {tuple(inputs.shape)}")
        squares = F.mse_loss(at_least_float32(reconstructions), at_least_float32(inputs), reduction="sum")
        return Terms(squares, inputs.numel())

    def forward(self, reconstructions: Tensor, inputs: Tensor) -> Tensor:
        return self.terms(reconstructions, inputs).mean()
