"""One file that holds a compressed model: bytes near the entropy of its weights, and back again bit for bit."""
