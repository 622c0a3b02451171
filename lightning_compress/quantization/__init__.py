"""What to round: grids, fake-quantization and its attachment to a module."""
