"""Floor 3: one token at a time."""
