"""The models of q2, their initial weights a function of the seed alone."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from dlops_dist.config import Q2
from dlops_dist.distributed.norm import SyncBatchNorm1d
from dlops_dist.models.autoencoder import StackedAutoencoder, StackedAutoencoderClassifier

NORMS = {"none": None, "batch": SyncBatchNorm1d, "layer": nn.LayerNorm}


def build_stack(settings: Q2, num_inputs: int) -> StackedAutoencoder:
    chosen = settings.model
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        return StackedAutoencoder(num_inputs, chosen.layers, NORMS[chosen.norm], chosen.tied)


def build_classifier(settings: Q2, encoders: Sequence[nn.Module], num_classes: int) -> StackedAutoencoderClassifier:
    """A new head on copies of the encoders."""
    chosen = settings.model
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        return StackedAutoencoderClassifier(
            copy.deepcopy(list(encoders)), chosen.code_layer, num_classes, chosen.dropout, settings.finetune,
            SyncBatchNorm1d if chosen.standardize else None,
        )  # fmt: skip
