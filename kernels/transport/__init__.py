"""Bytes between processes: frames on channels, named by address; knows neither tensors nor requests."""
