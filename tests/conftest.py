"""The order of the tests: files that take long begin first, so that no worker idles while another ends with one.
What property tests draw: the same in every run, so that a failure comes from a change; others in ``make soak``."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.register_profile("other", derandomize=False)
hypothesis.settings.load_profile("same")

LONG = (
    "pipeline/test_pipeline.py",
    "training/test_runs.py",
    "training/test_modality.py",
    "training/test_faults.py",
    "test_data_page.py",
    "training/test_forecast.py",
    "data/test_storage.py",
    "training/test_engine.py",
    "model/test_compile.py",
    "data/test_limits.py",
    "training/test_weighting.py",
    "training/test_curves.py",
    "data/test_balance.py",
)
"""The longest first; `pytest --durations=80` shows them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of LONG first; the rest as it came."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))
