"""Tensor to tensor parts: activations, norms, attention, context."""
