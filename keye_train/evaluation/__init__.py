"""Held-out loss, generation, scoring and retrieval. ``evaluate`` is the way in."""

from keye_train.evaluation.evaluate import evaluate

__all__ = ["evaluate"]
