"""Fixtures of the data chain. Makes the helper module of this folder importable under ``--import-mode=importlib``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))

from toy_shards import Members, mixed_samples, write_tokenizer

from data_tools.cli import main
from data_tools.shards import sample_key, write_shard
from keye_train.data.index import tokenizer_fingerprint
from keye_train.data.indexing import build_index
from keye_train.settings import SourceSettings


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def foreign_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("foreign"), ("<|more|>",))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)


@pytest.fixture(scope="session")
def make_shard(tokenizer: PreTrainedTokenizerFast, tokenizer_dir: Path) -> Callable[..., Path]:
    """Write samples as an indexed shard."""

    def make(path: Path, samples: list[Members], index: bool = True) -> Path:
        write_shard(path, ((sample_key(number), members) for number, members in enumerate(samples)))
        if index:
            build_index(path, tokenizer, tokenizer_fingerprint(tokenizer_dir))
        return path

    return make


@pytest.fixture(scope="session")
def toy_sources(tmp_path_factory: pytest.TempPathFactory, make_shard: Callable[..., Path]) -> dict[str, SourceSettings]:
    """Two sources; "a" has two shards."""
    folder = tmp_path_factory.mktemp("shards")
    for number, name in enumerate(("a-0", "a-1", "b-0")):
        make_shard(folder / f"{name}.tar", mixed_samples(24, number))
    return {
        "a": SourceSettings([str(folder / "a-*.tar")]),
        "b": SourceSettings([str(folder / "{b,b}-0.tar")]),
    }


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run ``keye-data`` with words that are the user's mistake; what it says: one line, and exit status 2."""

    def run(*words: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in words])
        said = capsys.readouterr()
        assert left.value.code == 2, left.value.code
        last = said.err.splitlines()[-1]  # behind bars of progress
        assert f"keye-data {words[0]}: error: " in last, said.err
        return last

    return run
