"""Makes the helper modules of this folder importable under ``--import-mode=importlib``; checkpoints to start from."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from toy_sources import write_siglip

    return write_siglip(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="session", params=[False, True], ids=["untied", "tied"])
def qwen3(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from toy_sources import write_qwen3

    return write_qwen3(tmp_path_factory.mktemp("qwen3"), tied=request.param)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from toy_inputs import toy_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    toy_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def start(siglip: Path, qwen3: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``keye-convert start`` on the three above, with seed 3."""
    from keye_train.model.convert import convert_start

    out = tmp_path_factory.mktemp("start") / "export"
    convert_start(siglip, qwen3, out, tokenizer=tokenizer, seed=3)
    return out
