"""What strangers wrote, made fit for a terminal and a page."""

from __future__ import annotations

import re

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text with control characters, marks of writing direction and half surrogates as escapes.

    Captions and keys are strangers': none may steer a terminal or turn the text around it.
    """
    return _CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """``printable``, and on one line: a reason that a sample brings with it must not look like several."""
    return " ".join(printable(text).split())
