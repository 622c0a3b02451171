"""The errors a user of this package can meet; each message says what was expected, what came, where, and the cure."""

from __future__ import annotations

__all__ = [
    "CheckpointMismatch",
    "CompressError",
    "IncompatibleCallbacks",
    "NothingToCompress",
    "ProcessesDiffer",
    "UnsupportedStrategy",
]


class CompressError(Exception):
    """Any error of this package that is not a plain `ValueError` or `TypeError` about one argument."""


class NothingToCompress(CompressError):
    """A callback selected nothing, so that the run would have gone on uncompressed; raised before the first batch."""


class IncompatibleCallbacks(CompressError):
    """Two callbacks (or a callback and a reparametrized weight) want one parameter; raised before the first batch."""


class CheckpointMismatch(CompressError):
    """A checkpoint's compression state belongs to another recipe, model or a newer format; raised on loading."""


class ProcessesDiffer(CompressError):
    """Processes of one run do not have the same recipe, starting weights, masks or ranges; raised on all of them."""


class UnsupportedStrategy(CompressError):
    """The run's strategy shards parameters in a way that a callback cannot compress yet; raised at `setup`."""
