"""The real machine: chunk store and tiers, streams, the transformer driver, generation."""
