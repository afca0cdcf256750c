"""Held-out loss, generation and scoring."""
