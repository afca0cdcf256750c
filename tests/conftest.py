"""The order of the tests: files that take long begin first, so that no worker idles while another ends with one.
What tests draw: the same in every run and any order, so that a failure comes from a change; property tests draw other
values in ``make soak``."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest

# Neither the home of whoever runs the tests nor a proxy of the machine is of any account: what libraries keep goes into
# a folder of these tests, and servers on loopback are asked directly.
KEPT = tempfile.TemporaryDirectory(prefix="keye-tests-")
os.environ.setdefault("HF_HOME", KEPT.name)
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "localhost,127.0.0.1"

# No verdict hangs on the speed of a machine: neither on the time that an example takes nor on that of drawing it.
TIMELESS = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("same", derandomize=True, **TIMELESS)
hypothesis.settings.register_profile("other", derandomize=False, **TIMELESS)
hypothesis.settings.load_profile("same")

SEED = 87_654_321
"""Of none of the generators that tests make: what is drawn with those is never drawn here once more."""

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


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Draws without a generator of their own begin alike, whatever ran before in this process; fixtures' too."""
    random.seed(SEED)
    np.random.seed(SEED)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)
