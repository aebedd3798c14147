"""Floor 1: the simulated executor, its cost model, streams and links. No torch."""
