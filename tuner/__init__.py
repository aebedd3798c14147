"""Floor 4: search space, objective by simulation, search, confirmation on the real runtime."""
