"""Promise: the manifest has the SHA-256 of every input, whether it was taken on the way or in a pass of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from keye_train.merging import input_hashes, merge
from keye_train.merging.places import ExportError, TensorPlace
from keye_train.merging.reading import Files
from keye_train.merging.streaming import Workers
from keye_train.runs import MANIFEST, file_sha256, read_json
from keye_train.settings import MergeSettings

Export = Callable[..., Path]


def tensors(seed: int, *more: str) -> dict[str, Tensor]:
    """Tensors of one, and of several pieces of work."""
    draw = torch.Generator().manual_seed(seed)
    sizes = {"a": 3, "b": 2_100_000, "c": 40, "d": 1_300_000} | dict.fromkeys(more, 10)
    return {name: torch.randn(size, generator=draw) for name, size in sizes.items()}


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize(
    ("second", "on_the_way"),
    [
        ({}, 4),  # two files of each
        ({"shards": 3}, 5),  # each of these files is in order
        ({"shards": 1}, 2),  # this one is not: a b c d, and the first model has a c, b d
        ({"more": ["e"]}, 3),  # with ``allow``, "e" is dropped, and not read
    ],
    ids=["same files", "other files", "other order", "a tensor too many"],
)
def test_hashes_of_all_inputs(
    second: dict[str, object],
    on_the_way: int,
    threads: int,
    export: Export,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[object] = []
    sha256 = input_hashes.FileHash.sha256

    def counted(self: input_hashes.FileHash) -> str:
        taken.append(self.file)
        return sha256(self)

    monkeypatch.setattr(input_hashes.FileHash, "sha256", counted)
    more = second.get("more", [])
    folders = [
        export("first", tensors(0), shards=2),
        export("second", tensors(1, *more), shards=second.get("shards", 2)),  # type: ignore[misc]
    ]
    settings = MergeSettings(
        models=[str(one) for one in folders], out=str(tmp_path / "out"), threads=threads, allow=["missing", "extra"]
    )
    manifest = read_json(merge(settings, progress=False) / MANIFEST)
    for folder, parent in zip(folders, manifest["parents"], strict=True):
        assert {name: file["sha256"] for name, file in parent["files"].items()} == {
            name: file_sha256(folder / name) for name in parent["files"]
        }
        assert any(name.endswith(".safetensors") for name in parent["files"])
    assert len(taken) == on_the_way


def test_nobody_waits_for_a_part_that_cannot_be_read(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, update = Files.fetch, input_hashes.FileHash.update
    waiting = threading.Event()

    def failing(self: Files, place: TensorPlace, begin: int, *values: Any) -> Tensor:
        if place.name == "b" and begin == 0:
            assert waiting.wait(250)  # another thread has the next piece, and waits until this one is in
            raise ExportError("the disk is dying")
        return fetch(self, place, begin, *values)

    def noted(self: input_hashes.FileHash, at: int, data: memoryview) -> None:
        if at != self._at:
            waiting.set()
        update(self, at, data)

    monkeypatch.setattr(Files, "fetch", failing)
    monkeypatch.setattr(input_hashes.FileHash, "update", noted)
    folders = [export(name, tensors(seed)) for seed, name in enumerate("xyz")]
    settings = MergeSettings(models=[str(one) for one in folders], out=str(tmp_path / "out"), threads=3)
    with pytest.raises(ExportError, match="the disk is dying"):
        merge(settings, progress=False)


def test_nobody_waits_for_a_piece_that_is_dropped() -> None:
    dropped = threading.Event()

    def failing() -> bool:
        raise ExportError("the disk is dying")

    with Workers(2, models=1) as workers, pytest.raises(ExportError, match="dying"):
        list(workers.in_order([failing, dropped.wait], dropped.set))
