"""Floor 5: the commands. Each imports what it needs in its body, so `--help` is instant."""
