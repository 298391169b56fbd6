"""The routed experts, spread over shards, and the plug that models dispatch their tokens through."""
