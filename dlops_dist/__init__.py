"""Distributed training that computes the same answer on any number of workers."""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Augment": "config", "CenterLoss": "losses", "CrossEntropyLoss": "losses", "Data": "config.training",
    "Embedder": "distributed.exact", "Keyed": "data.transforms", "Optimizer": "config", "Recipe": "engine.recipe",
    "Run": "config", "Section": "config.section", "Terms": "losses", "TripletLoss": "losses", "Whole": "losses",
    "exact": "distributed.exact", "load": "engine.result", "map_at_r": "metrics", "recall_at": "metrics",
    "top_k": "metrics",
}  # fmt: skip
"""What recipes are written with, and `load`: where each is."""


def __getattr__(name: str) -> Any:
    """On demand: torch takes seconds to import, and --help needs none of it."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
