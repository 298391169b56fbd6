"""The configurations in which kernels are launched for the real model, by operation."""
