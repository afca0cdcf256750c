"""A run as one HTML page, and the page about its merge. ``write_report`` and ``write_merge_page`` are the ways in."""

from keye_train.report.merge_page import write_merge_page
from keye_train.report.page import write_report

__all__ = ["write_merge_page", "write_report"]
