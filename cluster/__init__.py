"""Floor 5: the way in and the way out of the cluster."""
