"""Promises: values are the same whether they come past the page cache, through it, or partly so; what the cache holds
comes from there; models may have more files than a process may open."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from keye_train.merging import merge, reading
from keye_train.merging.buffers import Buffers
from keye_train.merging.reading import ExportReader, open_files_each
from keye_train.settings import MergeSettings, SettingsError

DESCRIPTORS = Path("/proc/self/fd")
PAST_THE_CACHE = ["past the page cache", "in two parts"]


@contextmanager
def may_open(count: int) -> Iterator[None]:
    """Let this process open ``count`` files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def open_now(folder: Path) -> int:
    """Descriptors of this process that stand for files in a folder."""
    found = 0
    for link in DESCRIPTORS.iterdir():
        with suppress(FileNotFoundError):  # that of the list itself, or another thread's
            found += link.readlink().is_relative_to(folder)
    return found


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDWR)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@pytest.mark.parametrize("disk", [*PAST_THE_CACHE, "refused when opened", "refused when read", "cached"])
def test_fetched_values(
    disk: str, export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "DIRECT_BYTES", 1)
    monkeypatch.setattr(reading, "_in_page_cache", lambda file: disk == "cached")  # the system may keep or drop it
    read = reading._read_direct
    n_read = []

    def counted(descriptor: int, into: torch.Tensor, at: int) -> int:
        if disk == "in two parts":
            into = into[: len(into) // 8192 * 4096]
        n_read.append(0 if disk == "refused when read" else read(descriptor, into, at))
        return n_read[-1]

    monkeypatch.setattr(reading, "_read_direct", counted)
    if disk == "refused when opened":
        monkeypatch.delattr(reading.os, "O_DIRECT")
    draw = torch.Generator().manual_seed(0)
    values = {"a": torch.randn(30_001, generator=draw), "b": torch.randn(12_345, generator=draw).bfloat16()}
    reader = ExportReader(export("model", values))
    can_be_had = _can_be_had(reader.folder / "model.safetensors")
    forget(reader.folder)
    buffers = Buffers()
    for name, whole in values.items():
        for begin, end in ((0, len(whole)), (1, 5000), (4095, 4097), (len(whole) - 3, len(whole))):
            found = reader.files.fetch(reader.places[name], begin, end - begin, buffers, 0)
            assert found.dtype == whole.dtype
            assert torch.equal(found, whole[begin:end])
    reader.close()
    assert (sum(n_read) > 0) == (can_be_had and disk in PAST_THE_CACHE)


def _can_be_had(file: Path) -> bool:
    """Whether the file system of the tests opens files past the page cache."""
    descriptor = reading._open_direct(file)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is not None


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="needs Linux")
def test_the_page_cache_is_asked(tmp_path: Path) -> None:
    """By a file that was written past it, and then read."""
    file = tmp_path / "x"
    file.touch()
    descriptor, data = reading._open_direct(file), mmap.mmap(-1, 1 << 20)
    with file.open("r+b", buffering=0) as opened:
        if descriptor is not None:
            os.close(descriptor)
            fcntl.fcntl(opened, fcntl.F_SETFL, os.O_DIRECT)
        opened.write(data)
    if descriptor is not None:
        assert not reading._in_page_cache(file)
    assert file.read_bytes() == data[:]
    assert reading._in_page_cache(file) == _can_say(file)


def _can_say(file: Path) -> bool:
    """Whether the file system of the tests knows reads that do not wait; tmpfs does not."""
    with file.open("rb") as opened:
        try:
            return os.preadv(opened.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return False


class TestLimitOfOpenFiles:
    def test_threads_read_right_values_from_more_files_than_stay_open(
        self, export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(reading, "DIRECT_BYTES", 4000)  # some pieces past the page cache, some through it
        values = {f"t{n:02d}": torch.arange(1500) + 10_000 * n for n in range(24)}
        reader = ExportReader(export("model", values, shards=12))
        forget(reader.folder)
        reader.files.limit = 3
        buffers = Buffers()

        def right(turn: int) -> bool:
            name, count = f"t{turn * 7 % 24:02d}", (20, 1500)[turn % 2]
            found = reader.files.fetch(reader.places[name], 0, count, buffers, 0)
            reader.files.expect(reader.places[name], 0, count)
            return torch.equal(found, values[name][:count])

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(right, range(600)))
        assert 1 <= open_now(reader.folder) <= 3
        reader.close()
        assert open_now(reader.folder) == 0

    def test_a_merge_of_more_files_than_the_process_may_open(
        self, export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(reading, "DIRECT_BYTES", 1)
        # This process may have many files of other tests open: the models have as many as it may open in all.
        allowed = 2 * len(list(DESCRIPTORS.iterdir())) + 60
        shards = allowed // 2
        draw = torch.Generator().manual_seed(0)
        models = [{f"t{n:03d}": torch.randn(50, generator=draw) for n in range(shards)} for _ in range(2)]
        folders = [str(export(f"m{number}", tensors, shards=shards)) for number, tensors in enumerate(models)]
        with may_open(allowed):
            out = merge(MergeSettings(models=folders, out=str(tmp_path / "out")), progress=False)
        merged = load_file(out / "model.safetensors")
        for name, first in models[0].items():
            assert torch.equal(merged[name], ((first.double() + models[1][name].double()) / 2).float())

    def test_a_limit_below_one_file_for_each_model_is_named_before_anything_is_written(
        self, export: Callable[..., Path], tmp_path: Path
    ) -> None:
        allowed = len(list(DESCRIPTORS.iterdir())) + 100
        models = allowed // 4 + 1
        folders = [str(export("m", {"w": torch.ones(3)}))] * models
        with may_open(allowed), pytest.raises(SettingsError, match=rf"open {allowed}: .*ulimit -n {4 * models}\b"):
            merge(MergeSettings(models=folders, out=str(tmp_path / "out")), progress=False)
        assert [path.name for path in tmp_path.iterdir()] == ["m"]

    def test_half_of_the_limit_is_left_for_everything_else(self) -> None:
        with may_open(1024):
            assert open_files_each(4) == 128
