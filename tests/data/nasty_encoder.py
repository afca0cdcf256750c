"""An encoder that really hangs, waits, swallows memory or crashes where a text says so; for reader processes only."""

from __future__ import annotations

import ctypes
import time

import numpy as np

from keye_train.model.sample_encoder import WHOLE, EncodedSample, SampleEncoder
from keye_train.sample import Fit, Sample


class NastyEncoder(SampleEncoder):
    """What a fault in a decoder's C code does to its process."""

    def encode(self, sample: Sample, fit: Fit = WHOLE, out: np.ndarray | None = None) -> EncodedSample:
        text = sample.messages[-1]["content"]
        if text.startswith("SPIN"):
            while True:
                pass
        if text.startswith("WAIT"):
            time.sleep(600)
        if text.startswith("EAT"):
            eaten = []
            while True:
                eaten.append(bytearray(2**24))
        if text.startswith("CRASH"):
            ctypes.string_at(0)
        if text.startswith("BUG"):
            raise KeyError("a fault of ours")
        return super().encode(sample, fit, out)
