"""An encoder that really hangs, waits, swallows memory or crashes where a text says so; for reader processes only."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping

import numpy as np

from data_tools.index_cmd import ShardIndexer
from keye_train.data import indexing
from keye_train.data.index import ShardHeader
from keye_train.data.limits import Watch
from keye_train.model.sample_encoder import WHOLE, EncodedSample, SampleEncoder
from keye_train.model.video import probe_video
from keye_train.sample import Fit, MediaInfo, Sample


class NastyIndexer(ShardIndexer):
    """Indexes with such a decoder of video headers."""

    def __call__(self, shard: str, given_up: Mapping[int, str], watch: Watch, memory: object) -> ShardHeader:
        indexing.probe_video = nasty_probe  # of this process, which is none of the tests'
        return super().__call__(shard, given_up, watch)


def nasty_probe(data: bytes) -> MediaInfo:
    if data.startswith(b"SPIN"):
        while True:
            pass
    if data.startswith(b"CRASH"):
        ctypes.string_at(0)
    return probe_video(data)


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
