"""Fixtures of the training tests. Makes the helper modules of this folder importable under importlib mode."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from corpus import ToyCorpus, write_corpus


@pytest.fixture(scope="session")
def toy_corpus(tmp_path_factory: pytest.TempPathFactory) -> ToyCorpus:
    """A small real corpus with recipes for it."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
