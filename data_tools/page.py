"""Self-contained HTML pages: no script, no network, every value from data escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from keye_train.report.rendering import write_page


def write_html(out: Path, template: str, values: dict[str, Any]) -> Path:
    """Render a template of this package, in the frame and style of the reports; see ``write_page``."""
    return write_page(out, template, values, ("data_tools",), ("style.css", "data.css"))
