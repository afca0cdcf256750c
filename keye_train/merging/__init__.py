"""Averaging of checkpoints."""
