"""Checkpoints on the disk: slices of parameters and of their optimizer states, readable by anything that reads files.

::

    checkpoints/step-N/
      rank-00000.safetensors  what one rank held: slices named "<state>/<parameter>[<start>:<stop>]", float32, flat
      index.json              shape of each parameter, names of the states, which file holds which slices
      state.json              step, updates, position in the data, non-finite counts
      manifest.json           recipe, parent, versions, commit and data fingerprint of the run that wrote it
      complete.json           size and SHA-256 of every other file; written last
      KEEP                    only in a marked checkpoint: it is never deleted; ``touch`` marks one by hand

A slice covers the elements ``start`` to ``stop`` of the parameter flattened in row-major order. The states are
``weights`` (the fp32 masters), ``exp_avg`` and ``exp_avg_sq`` (AdamW), and ``average`` where the recipe keeps a moving
average. The slices of a parameter are the same for all states and cover it without gap or overlap; how they are cut is
the business of whoever wrote them (world size, ZeRO stage), and no reader needs to know. Frozen parameters are absent.
Nothing is ever unpickled.

This package knows files only: no engine, no model. :class:`CheckpointReader` is the way in.
"""

from keye_train.checkpoints.folder import fault, newest_first, remove
from keye_train.checkpoints.layout import AVERAGE, MOMENTS, STATES, WEIGHTS, Slice
from keye_train.checkpoints.reader import CheckpointReader
from keye_train.checkpoints.writer import NamedSlice, write_index, write_slices

__all__ = [
    "AVERAGE",
    "MOMENTS",
    "STATES",
    "WEIGHTS",
    "CheckpointReader",
    "NamedSlice",
    "Slice",
    "fault",
    "newest_first",
    "remove",
    "write_index",
    "write_slices",
]
