"""Load for a running cluster, and what came of it: `trivium bench`."""
