"""Averages judged by held-out samples: where merging and evaluation meet. ``search_soup`` and ``draw_curve`` are the
ways in."""

from keye_train.soups.curve import draw_curve
from keye_train.soups.soup import search_soup

__all__ = ["draw_curve", "search_soup"]
