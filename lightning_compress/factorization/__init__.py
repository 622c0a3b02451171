"""Low rank: a weight as the product of two smaller ones."""
