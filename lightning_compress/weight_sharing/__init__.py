"""Weights that share a few values: codebooks by k-means, and what moves them."""
