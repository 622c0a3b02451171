"""What to zero: criteria, exact thresholds and masks."""
