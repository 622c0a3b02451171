"""What a run will do to a module, found out before it starts: on a copy, with no training step."""
