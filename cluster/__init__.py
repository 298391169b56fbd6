"""Floor 5: the way in and the way out of the cluster."""

import gc

# What a process imports stays: looking at it again and again would be a quarter of the time that torch takes.
gc.set_threshold(20_000, *gc.get_threshold()[1:])
