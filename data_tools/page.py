"""Self-contained HTML pages: no script, no network, every value from data escaped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from keye_train.report.rendering import write_page

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text with control characters, marks of writing direction and half surrogates as escapes.

    Captions and keys are strangers': none may steer a terminal or turn the text around it.
    """
    return _CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def write_html(out: Path, template: str, values: dict[str, Any]) -> Path:
    """Render a template of this package, in the frame and style of the reports; see ``write_page``."""
    return write_page(out, template, values, ("data_tools",), ("style.css", "data.css"))
