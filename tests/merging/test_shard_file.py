"""Promise: a shard has the bytes that the format asks for and the checksum that is noted, whatever the disk can do."""

from __future__ import annotations

import errno
import os
from concurrent import futures
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from keye_train.merging import shard_file
from keye_train.merging.shard_file import ALIGNMENT, PlannedTensor, ShardFile
from keye_train.runs import file_sha256

CHUNK = 2 * ALIGNMENT


@pytest.mark.parametrize("disk", ["past the page cache", "refused when opened", "refused when written"])
@pytest.mark.parametrize("elements", [3, 1000, 2 * CHUNK, 5 * CHUNK + 7])
def test_bytes_and_checksum(disk: str, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_file, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(shard_file, "FLUSH_BYTES", CHUNK)
    if disk == "refused when opened":
        monkeypatch.setattr(shard_file, "_set_direct", lambda descriptor, direct: False)
    if disk == "refused when written":
        monkeypatch.setattr(shard_file, "ALIGNMENT", 1)  # the system takes no such length: EINVAL
    draw = torch.Generator().manual_seed(elements)
    values = {"w": torch.randn(elements, generator=draw), "v": torch.randn(5, 2, generator=draw).bfloat16()}
    planned = [PlannedTensor(name, value.dtype, tuple(value.shape)) for name, value in values.items()]
    with ShardFile(tmp_path / "x.safetensors", planned) as shard:
        for value in values.values():
            for piece in value.view(-1).split(999):
                shard.write(piece)
    assert shard.sha256 == file_sha256(shard.file)
    read = load_file(shard.file)
    assert all(torch.equal(read[name], value) for name, value in values.items())


def test_a_failing_disk_is_told_when_no_thread_writes_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what is still to be written would go into whatever file has the descriptor next."""
    writing: list[int] = []
    close = os.close

    def failing(self: ShardFile, data: memoryview, at: int) -> None:
        raise OSError(errno.EIO, "the disk is dying")

    def counted(descriptor: int) -> None:
        if descriptor == shard._descriptor:  # others of this process are closed whenever they are
            writing.append(sum(thread.is_alive() for thread in shard._writers._threads))
        close(descriptor)

    monkeypatch.setattr(shard_file, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(ShardFile, "_write", failing)
    planned = PlannedTensor("w", torch.uint8, (CHUNK,))
    shard = ShardFile(tmp_path / "x.safetensors", [planned])
    shard.write(torch.zeros(CHUNK, dtype=torch.uint8))
    futures.wait(shard._writes)
    monkeypatch.setattr(shard_file.os, "close", counted)
    with pytest.raises(OSError, match="dying"), shard:
        pass  # it comes out with the last piece
    assert writing
    assert not any(writing)
