"""Averaging checkpoints.

``merge`` is the way in. A model is opened by ``sources``; ``compatibility`` and ``accounting`` settle what becomes of
each tensor; ``rules`` picks the arithmetic (``methods``, ``geometry``, ``deltas``); ``streaming`` and ``weights`` run
it over the files; ``output`` makes the result whole or absent; ``verify`` checks it later.
"""

from keye_train.merging.compatibility import MergeError
from keye_train.merging.merge import merge

__all__ = ["MergeError", "merge"]
