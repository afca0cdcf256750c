"""From models and their accounts to the shards of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from keye_train.merging.accounting import Accounts, Share
from keye_train.merging.compatibility import MergeError, value_problems
from keye_train.merging.input_hashes import InputHashes
from keye_train.merging.methods import BLOCK, scan_values
from keye_train.merging.reading import ExportReader
from keye_train.merging.rules import CopyRule, LinearRule, Rule, rule_for, tensor_weights
from keye_train.merging.shard_file import PlannedTensor, ShardFile
from keye_train.merging.streaming import Workers
from keye_train.settings import MergeSettings
from keye_train.settings.merge_methods import METHODS


class _Refused(Exception):
    """The values of a tensor cannot be merged; why, and which others cannot, is looked up for all tensors then."""

    def __init__(self, tensor: str) -> None:
        super().__init__(tensor)
        self.tensor = tensor


def merge_weights(
    folder: Path,
    readers: Sequence[ExportReader],
    shards: dict[str, list[PlannedTensor]],
    accounts: Accounts,
    settings: MergeSettings,
    hashes: InputHashes,
    progress: bool,
) -> Iterator[tuple[str, str]]:
    """Write every shard; yields file name and SHA-256 of each that is whole and on the disk.

    What is read goes into ``hashes``.

    Raises:
        MergeError: values that are not finite, or unequal tensors of a type that is not averaged.
    """
    n_bytes = sum(tensor.n_bytes for tensors in shards.values() for tensor in tensors)
    quiet = None if progress else True  # None: no bar where stderr is no terminal
    places = [place for reader in readers for place in reader.places.values()]
    itemsize = max((place.dtype.itemsize for place in places if place.elements >= BLOCK), default=4)
    with (
        Workers(settings.threads, len(readers), settings.base is not None, max(4, itemsize)) as workers,
        tqdm(total=n_bytes, unit="B", unit_scale=True, desc="merge", disable=quiet) as bar,
    ):
        for file, tensors in shards.items():
            with ShardFile(folder / file, tensors) as shard:
                job = _ShardJob(readers, accounts, settings, workers, hashes)
                try:
                    with closing(workers.in_order(job.tasks(tensors), hashes.give_up)) as results:
                        for memory, piece in results:
                            shard.write(piece)
                            bar.update(piece.nbytes)
                            workers.outputs.put(memory)
                except _Refused as refused:
                    raise MergeError(job.reasons(refused.tensor)) from None
            yield file, shard.sha256


class _ShardJob:
    """The pieces of work of one shard."""

    def __init__(
        self,
        readers: Sequence[ExportReader],
        accounts: Accounts,
        settings: MergeSettings,
        workers: Workers,
        hashes: InputHashes,
    ) -> None:
        self.readers, self.accounts, self.settings = readers, accounts, settings
        self.workers, self.hashes = workers, hashes
        self.scanned = False  # the tensor at hand was read once already, and may still be in the page cache

    def tasks(self, tensors: Sequence[PlannedTensor]) -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:
        """One task for each piece, in the order of the file."""
        for tensor in tensors:
            share = self.accounts.shares[tensor.name]
            self.scanned = False
            rule = self._rule(share)
            read = self._read if self.scanned else self._fetch
            for begin, count in self._pieces(tensor):
                if self.scanned:
                    self._read_ahead(share, begin + count)
                yield partial(self._merge_piece, share, rule, read, begin, count)

    def reasons(self, first: str) -> list[str]:
        """Why the values cannot be averaged, for all tensors and not only for the ``first`` that failed."""
        shares = self.accounts.shares
        merged = [name for name, share in shares.items() if share.merged]
        copied = [name for name, share in shares.items() if share.must_agree]
        return value_problems(self.readers, merged + copied) or [
            f"{first}: its average does not fit {shares[first].planned.dtype}: choose dtype=float32 or dtype=bfloat16"
        ]

    def _rule(self, share: Share) -> Rule:
        name = share.planned.name
        if not share.merged:
            return CopyRule(share.must_agree)
        if len(share.members) == 1:
            return LinearRule([1.0], mean=True)
        has_base = self.settings.base is not None
        weights = tensor_weights(self.settings, name)
        weights = [weights[i] for i in (share.members[:-1] if has_base else share.members)]
        if METHODS[self.settings.method].weights != "factor" and not any(weights):
            weights = [1.0] * len(weights)  # none of the models that have the tensor was given a weight
        try:
            return rule_for(self.settings, name, weights, share.planned.elements, partial(self._scan, share))
        except ValueError as error:
            raise MergeError([f"{name}: {error}; choose another method"]) from error

    def _scan(self, share: Share, look: Callable[[Sequence[Tensor], int], Any]) -> Iterator[Any]:
        self.scanned = True

        def task(begin: int, count: int) -> Any:
            pieces = self._read(share, begin, count)
            with self.workers.computing:
                if not scan_values(pieces)[0]:
                    raise _Refused(share.planned.name)
                return look(pieces, begin)

        return self.workers.in_order(partial(task, begin, count) for begin, count in self._pieces(share.planned))

    def _merge_piece(
        self, share: Share, rule: Rule, read: Callable[[Share, int, int], list[Tensor]], begin: int, count: int
    ) -> tuple[Tensor, Tensor]:
        try:
            pieces = read(share, begin, count)
        except BaseException:
            self.hashes.give_up()  # others wait for this piece, and a scan of the next tensor for their threads
            raise
        for i, piece in zip(share.members, pieces, strict=True):
            self.hashes.update(i, self.readers[i].places[share.planned.name], begin, piece)
        dtype = share.planned.dtype
        memory = self.workers.outputs.get()
        if memory.numel() < count * dtype.itemsize:
            memory = torch.empty(self.workers.piece_elements * dtype.itemsize, dtype=torch.uint8)
        out = memory[: count * dtype.itemsize].view(dtype)
        with self.workers.computing:
            if not rule(pieces, begin, out):
                raise _Refused(share.planned.name)
        return memory, out

    def _read(self, share: Share, begin: int, count: int) -> list[Tensor]:
        pieces = []
        for i in share.members:
            place = self.readers[i].places[share.planned.name]
            pieces.append(self.workers.buffers.take(i, count, place.dtype))
            self.readers[i].files.read(place, begin, pieces[-1])
        return pieces

    def _fetch(self, share: Share, begin: int, count: int) -> list[Tensor]:
        name, buffers = share.planned.name, self.workers.buffers
        return [
            self.readers[i].files.fetch(self.readers[i].places[name], begin, count, buffers, i) for i in share.members
        ]

    def _read_ahead(self, share: Share, begin: int) -> None:
        ahead = 2 * self.workers.threads * self.workers.piece_elements
        for i in share.members:
            place = self.readers[i].places[share.planned.name]
            if begin < place.elements:
                self.readers[i].files.expect(place, begin, min(ahead, place.elements - begin))

    def _pieces(self, tensor: PlannedTensor) -> Iterator[tuple[int, int]]:
        step = self.workers.piece_elements
        for begin in range(0, tensor.elements, step):
            yield begin, min(step, tensor.elements - begin)
