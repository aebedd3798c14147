"""Floor 0: the vocabulary and the decider. No torch, no simpy, no clock, no global random."""
