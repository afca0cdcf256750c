"""Averaging checkpoints. ``merge`` is the way in; ``methods`` holds the arithmetic, ``streaming`` the files."""

from keye_train.merging.compatibility import MergeError
from keye_train.merging.merge import merge

__all__ = ["MergeError", "merge"]
