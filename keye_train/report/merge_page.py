"""The page about an average: diagnosis of the models, the line between two of them, the search for weights.

``keye-merge diagnose``, ``curve`` and ``search`` each write it with their own part; a pipeline's has all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keye_train.report.diagnosis import diagnosis_section
from keye_train.report.rendering import write_page
from keye_train.report.soup import curve_section, soup_section

logger = logging.getLogger(__name__)

PAGE = "merge.html"


def write_merge_page(
    out: Path,
    title: str,
    diagnosis: Mapping[str, Any] | None = None,
    curve: Mapping[str, Any] | None = None,
    soup: Mapping[str, Any] | None = None,
    back: str | None = None,
) -> Path:
    """Write the page; parts that are None are left out.

    Args:
        out: the HTML file; it appears whole or not at all.
        title: its heading.
        diagnosis: content of diagnosis.json.
        curve: content of curve.json.
        soup: content of soup.json.
        back: address of the page that links here.

    Returns:
        ``out``.
    """
    values = {
        "title": title,
        "back": back,
        "soup": soup_section(soup) if soup else None,
        "curve": curve_section(curve) if curve else None,
        "diagnosis": diagnosis_section(diagnosis) if diagnosis else None,
    }
    write_page(out, "merge.html", values)
    logger.info("merge page: %s", out)
    return out
