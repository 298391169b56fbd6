"""Floor 5: the way in and the way out of the cluster."""

import gc

# What is imported stays: looking at it again and again is a quarter of the time that importing torch takes.
gc.set_threshold(20_000, *gc.get_threshold()[1:])
