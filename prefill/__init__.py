"""Floor 4: the whole prompt at once."""
