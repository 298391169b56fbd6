"""Tensors, never requests: operations, the model and the transport of tensors."""
