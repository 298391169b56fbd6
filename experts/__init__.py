"""Floor 2: the experts, spread over shards."""
