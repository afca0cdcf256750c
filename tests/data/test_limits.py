"""Promise: a sample that hangs, swallows memory or crashes its decoder costs itself, and nothing else."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from nasty_encoder import NastyEncoder, NastyIndexer
from test_loader import TOY_COST, Sources, assert_same, make_loader, read_all
from toy_shards import chat, clip, toy_settings
from transformers import PreTrainedTokenizerFast

from data_tools.index_cmd import NO_TENSORS
from data_tools.shards import sample_key
from keye_train.data.index import read_columns, tokenizer_fingerprint
from keye_train.data.limits import DecodeLimits
from keye_train.data.loader import Loader
from keye_train.data.plan import Plan
from keye_train.data.pool import ReaderPool
from keye_train.settings import SourceSettings, TrainSettings

NASTY = {
    # The start of both reasons: where the machine gives less than a fifth of a core, the clock comes first.
    1: ("SPIN", "data.decode_seconds=1"),
    4: ("WAIT", "longer than 5 s by the clock"),
    6: ("EAT", "more than data.decode_bytes=268435456 of memory"),
    9: ("CRASH", "ended the reader process by SIGSEGV"),
}


def texts(**nasty: str) -> list[dict[str, bytes]]:
    return [{"txt": (nasty.get(str(n), "word") + f" {n} " * (n + 10)).encode()} for n in range(16)]


def nasty_loader(settings: TrainSettings) -> Loader:
    encoder = NastyEncoder.from_settings(settings.model, settings.data.resolution)
    return Loader(Plan.from_settings(settings, TOY_COST), encoder, 0, 1, settings)


def source(path: Path, make_shard: Callable[..., Path], nasty: dict[str, str]) -> Sources:
    return {"a": SourceSettings([str(make_shard(path, texts(**nasty)))])}


def test_each_kind_of_nasty_sample_is_skipped_and_all_else_stays_as_it_was(
    tmp_path: Path, make_shard: Callable[..., Path], tokenizer_dir: Path
) -> None:
    sources = source(tmp_path / "a.tar", make_shard, {str(n): word for n, (word, _) in NASTY.items()})
    limits = {"decode_seconds": 1.0, "decode_bytes": 2**28, "window_samples": 16, "steps": 3, "global_batch_packs": 2}
    reference = read_all(toy_settings(sources, tokenizer_dir, **limits))  # a sound encoder finds nothing wrong
    with nasty_loader(toy_settings(sources, tokenizer_dir, workers=2, **limits)) as loader:
        steps = list(loader)
    reasons: dict[str, str] = {}
    whole = 0
    for got, expected in zip(steps, reference, strict=True):
        assert got.plan_state_after == expected.plan_state_after
        for pack, other in zip(got.packs, expected.packs, strict=True):
            assert pack.refs == tuple(ref for ref in other.refs if ref.key not in {sample_key(n) for n in NASTY})
            reasons |= {ref.key: reason for ref, reason in pack.skipped}
            if not pack.skipped:
                whole += 1
                assert_same(pack, other)
    read = {ref.key for step in reference for pack in step.packs for ref in pack.refs}
    assert set(reasons) == {sample_key(n) for n in NASTY} & read
    assert len(reasons) >= 3, "the plan left the nasty samples out"
    for number, (_, reason) in NASTY.items():
        assert reason in reasons.get(sample_key(number), reason)


def test_cpu_time_ends_a_process_that_spins() -> None:
    """By the kernel's timer alone: nobody looks at the clock of this process."""
    spin = (
        "from keye_train.data.limits import DecodeLimits, DecodeWatch, Progress\n"
        "with DecodeWatch(DecodeLimits(0.2, 2**30), Progress())(0):\n"
        "    while True: pass"
    )
    assert subprocess.run([sys.executable, "-c", spin], timeout=300).returncode == -signal.SIGPROF


def test_no_video_stops_or_hangs_the_index(
    tmp_path: Path, make_shard: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, tokenizer_dir: Path
) -> None:
    films = [{"0.mp4": data, "json": chat("?", "!", video="0.mp4")} for data in (clip(64, 48, 8), b"SPIN", b"CRASH")]
    shard = make_shard(tmp_path / "films.tar", [*films, {"txt": b"behind them"}], index=False)
    indexer = NastyIndexer(tokenizer, tokenizer_fingerprint(tokenizer_dir), None)
    pool = ReaderPool(indexer, 1, DecodeLimits(1.0, 2**30, "--decode-seconds"), NO_TENSORS)
    try:
        assert pool.submit(str(shard)).result().rows == 4
    finally:
        pool.close()
    errors = read_columns(str(shard), ["error"])["error"].to_pylist()
    assert errors[0] is None
    assert "--decode-seconds=1" in errors[1]  # of CPU time, or on a busy machine by the clock
    assert "SIGSEGV" in errors[2]
    assert errors[3] is None


def test_a_fault_of_ours_stops_the_run(tmp_path: Path, make_shard: Callable[..., Path], tokenizer_dir: Path) -> None:
    sources = source(tmp_path / "a.tar", make_shard, {"5": "BUG"})
    settings = toy_settings(sources, tokenizer_dir, workers=1, window_samples=16)
    with nasty_loader(settings) as loader, pytest.raises(RuntimeError, match="a fault of ours"):
        list(loader)


def test_the_limits_do_not_change_what_is_read(toy_sources: Sources, tokenizer_dir: Path) -> None:
    settings = toy_settings(toy_sources, tokenizer_dir, steps=2)
    tight = toy_settings(toy_sources, tokenizer_dir, steps=2, workers=1, decode_seconds=20.0, decode_bytes=2**27)
    with make_loader(tight) as loader:
        assert_same(list(loader), read_all(settings))
