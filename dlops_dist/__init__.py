"""Distributed training that computes the same answer on any number of workers."""

__version__ = "0.1.0"
