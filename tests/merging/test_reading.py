"""Promise: values are the same whether they come past the page cache, through it, or partly so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from keye_train.merging import reading
from keye_train.merging.reading import Buffers, ExportReader


@pytest.mark.parametrize("disk", ["past the page cache", "refused when opened", "refused when read", "in two parts"])
def test_fetched_values(
    disk: str, export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "DIRECT_BYTES", 1)
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
    buffers = Buffers()
    for name, whole in values.items():
        for begin, end in ((0, len(whole)), (1, 5000), (4095, 4097), (len(whole) - 3, len(whole))):
            found = reader.files.fetch(reader.places[name], begin, end - begin, buffers, 0)
            assert found.dtype == whole.dtype
            assert torch.equal(found, whole[begin:end])
    reader.close()
    assert (sum(n_read) > 0) == (disk in ("past the page cache", "in two parts"))
