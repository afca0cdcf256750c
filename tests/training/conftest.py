"""Fixtures of the training tests. Makes the helper modules of this folder importable under importlib mode."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from corpus import ToyCorpus, write_corpus


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """As many threads here as in the processes that tests start: sums then agree to the last bit."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_corpus(tmp_path_factory: pytest.TempPathFactory) -> ToyCorpus:
    """A small real corpus with recipes for it."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
