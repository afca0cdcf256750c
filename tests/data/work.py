"""Work of the interpreter, counted in calls: unlike its time it is the same on every machine, whatever else runs."""

from __future__ import annotations

import sys
from collections.abc import Callable


def python_calls(function: Callable[[], object]) -> int:
    """Calls of functions that ``function`` makes in this thread, those of the libraries' included."""
    count = 0

    def called(frame: object, event: str, value: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(called)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count
