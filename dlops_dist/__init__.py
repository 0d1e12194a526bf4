"""Distributed training that computes the same answer on any number of workers."""

import importlib
from typing import Any

__version__ = "0.1.0"

_FOR_RECIPES = {
    "CenterLoss": "losses", "CrossEntropyLoss": "losses", "Embedder": "distributed.exact",
    "Recipe": "engine.recipe", "Run": "config", "Section": "config.section", "Terms": "losses",
    "TripletLoss": "losses", "Whole": "losses", "exact": "distributed.exact", "load": "engine.result",
}  # fmt: skip
"""What a recipe is written with, and where it is."""


def __getattr__(name: str) -> Any:
    """On demand: torch takes seconds to import, and --help needs none of it."""
    if name not in _FOR_RECIPES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FOR_RECIPES[name]}"), name)
