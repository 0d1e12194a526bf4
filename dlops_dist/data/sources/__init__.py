"""Datasets as they are published, read into one shape."""

from dlops_dist.data.sources.image_folder import ImageFolder
from dlops_dist.data.sources.source import Listing, Source
from dlops_dist.data.sources.stl10 import STL10, unpack_stl10
from dlops_dist.data.sources.tiny_imagenet import TinyImageNet

__all__ = ["STL10", "ImageFolder", "Listing", "Source", "TinyImageNet", "unpack_stl10"]
