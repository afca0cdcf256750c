"""SHA-256 of the inputs, from the very pieces that a merge reads: their bytes come from the disk once.

A merge works through the tensors in the order of the first model's files. Where the files of a model have the same
order, as those of siblings do, its pieces follow each other without a gap; each thread adds the piece it has read as
soon as the one before is in.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from keye_train.merging.accounting import Share
from keye_train.merging.places import TensorPlace
from keye_train.merging.reading import ExportReader


class FileHash:
    """SHA-256 of one file whose parts come from many threads; each waits for its turn."""

    def __init__(self, file: Path, begin: int) -> None:
        """``begin``: where the values start; what is before is read here."""
        self.file = file
        with file.open("rb") as handle:
            self._digest = hashlib.sha256(handle.read(begin))
        self._at, self._end = begin, file.stat().st_size
        self._turn = threading.Condition()
        self._given_up = False

    def update(self, at: int, data: memoryview) -> None:
        """Add the bytes from ``at`` on, once all before are in."""
        with self._turn:
            self._turn.wait_for(lambda: self._given_up or self._at == at)
            if self._given_up:
                return
        self._digest.update(data)
        with self._turn:
            self._at += len(data)
            self._turn.notify_all()

    def give_up(self) -> None:
        """Let nobody wait any more: a part will not come."""
        with self._turn:
            self._given_up = True
            self._turn.notify_all()

    def sha256(self) -> str:
        """Hash of the whole file, once all is in."""
        assert self._at == self._end, f"{self.file}: parts are missing"
        return self._digest.hexdigest()


class InputHashes:
    """Hashes of the weight files that a merge reads from end to end, by number of the model and file."""

    def __init__(self, readers: Sequence[ExportReader], shares: Iterable[Share]) -> None:
        """``shares``: what is merged in this run, in its order."""
        order: dict[tuple[int, Path], list[tuple[int, int]]] = {}  # begin and end of each part
        for share in shares:
            for i in share.members:
                place = readers[i].places[share.planned.name]
                for file, at, first, last in place.parts(0, place.elements):
                    n_bytes = (last - first) * place.dtype.itemsize
                    order.setdefault((i, file), []).append((at, at + n_bytes))
        self.files: dict[tuple[int, Path], FileHash] = {}
        for key, parts in order.items():
            follow = all(end == begin for (_, end), (begin, _) in pairwise(parts))
            begin, end = parts[0][0], parts[-1][1]
            if follow and begin == _values_begin(key[1]) and end == key[1].stat().st_size:
                self.files[key] = FileHash(key[1], begin)

    def update(self, model: int, place: TensorPlace, begin: int, values: Tensor) -> None:
        """Add values of a tensor, from its value ``begin`` on, to the hashes of the files in which they stand."""
        data = values.view(torch.uint8).numpy().data
        item = place.dtype.itemsize
        for file, at, first, last in place.parts(begin, values.numel()):
            if (one := self.files.get((model, file))) is not None:
                one.update(at, data[first * item : last * item])

    def drop(self, model: int, file: Path) -> None:
        """Leave a file out."""
        self.files.pop((model, file), None)

    def give_up(self) -> None:
        """Let no thread wait for parts that will not come."""
        for one in self.files.values():
            one.give_up()


def _values_begin(file: Path) -> int:
    with file.open("rb") as handle:
        return 8 + int.from_bytes(handle.read(8), "little")
