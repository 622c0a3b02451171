"""Which amounts: how sensitive each layer is, what fits a budget, and a search over whole recipes."""
