"""Floor 3: measure this machine, fit it, and say how well the simulator then predicts it."""
