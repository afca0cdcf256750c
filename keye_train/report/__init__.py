"""A run as one HTML page. ``write_report`` is the way in."""

from keye_train.report.page import write_report

__all__ = ["write_report"]
