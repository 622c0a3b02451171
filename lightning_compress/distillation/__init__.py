"""What to imitate: losses, taps and teachers."""
