"""Names of files, states and slices of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, besides its step count
AVERAGE = "average"  # moving average of the weights
STATES = (WEIGHTS, *MOMENTS, AVERAGE)

PREFIX = "step-"
COMPLETE = "complete.json"
INDEX = "index.json"
STATE = "state.json"
MANIFEST = "manifest.json"
KEEP = "KEEP"
FORMAT = 2
"""1, which is still read: whole tensors named "<parameter>" and "<parameter>#<state>", no index and no manifest."""


@dataclass(frozen=True, order=True)
class Slice:
    """A run of elements of a flattened parameter, and the file that holds it."""

    start: int
    stop: int
    file: str


def slice_key(state: str, name: str, start: int, stop: int) -> str:
    """Name of a slice in its safetensors file."""
    return f"{state}/{name}[{start}:{stop}]"


def gap(slices: Iterable[Slice], elements: int) -> str | None:
    """What keeps ``slices``, in order, from covering ``elements`` exactly once; None where they do."""
    borders = [(0, 0), *((one.start, one.stop) for one in slices), (elements, elements)]
    for (_, end), (start, _) in pairwise(borders):
        if start != end:
            return f"elements {end} to {start} are missing" if start > end else f"elements {start} to {end} come twice"
    return None
