"""CompressionMonitor (placeholder until the measurements land)."""

import lightning.pytorch as L

__all__ = ["CompressionMonitor"]


class CompressionMonitor(L.Callback):
    """Log."""
