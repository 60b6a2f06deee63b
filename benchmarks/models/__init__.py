"""Whole networks, in inference and in training."""
