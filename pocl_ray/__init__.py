"""Distil large language models into small ones by progressive overload (POCL, arXiv 2506.05695), on Ray."""

__version__ = "0.1.0"
