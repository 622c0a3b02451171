"""Prune, quantize and distil inside one Lightning run, with no change to your module."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
