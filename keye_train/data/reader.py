"""Samples out of local shards: the whole tar in order (for the index), or one sample by its byte range (for training).

Both ways give the same bytes, because both let ``tarfile`` parse the same headers and both take regular files only.
"""

from __future__ import annotations

import io
import os
import struct
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from keye_train.data.formats import split_member_name
from keye_train.sample import SampleError

OPEN_SHARDS = 64
"""Shards that a reader keeps open; two file descriptors each."""

OFFSET_BYTES = 8


def offsets_path(shard: str | Path) -> Path:
    """``SHARD.tar.idx``: where each sample starts and where the last one ends, little-endian uint64.

    The layout that megatron-energon reads, too.
    """
    return Path(f"{shard}.idx")


@dataclass
class RawSample:
    """Members of one sample as they stand in the tar."""

    key: str
    offset: int  # byte of the first header
    size: int  # bytes up to the end of the last member, padding included
    members: dict[str, bytes] = field(default_factory=dict)  # name without the key -> bytes
    error: str | None = None  # why the sample cannot be read


def walk_shard(path: str | Path) -> Iterator[RawSample]:
    """All samples of a local tar in order, damaged ones included.

    Members that follow each other with the same key are one sample. Where the archive itself is damaged, the rest of
    it comes as one last sample with an error, so that its loss does not go unnoticed.
    """
    total = Path(path).stat().st_size
    current: RawSample | None = None
    end = 0  # of what could be read
    with Path(path).open("rb") as file:
        for member in _members(file):
            end = min(member.end, total)
            problem = member.problem
            try:
                key, name = split_member_name(member.name)
            except SampleError as error:
                key = name = member.name.encode("utf-8", "backslashreplace").decode()
                problem = str(error)
            if current is None or key != current.key:
                if current is not None:
                    yield current
                current = RawSample(key, member.offset, 0)
            _add_member(current, name, member.data, problem)
            current.size = end - current.offset
        if current is not None:
            yield current
        file.seek(end)
        if total == 0 or file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            yield RawSample(f"byte-{end}", end, total - end, error=f"the tar is damaged at byte {end}")


class ShardReader:
    """Reads single samples of local shards by their row, through ``SHARD.tar.idx``.

    Holds file descriptors; make one for each process.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[str, tuple[int, int]] = OrderedDict()  # shard -> (tar, idx), last used at the end

    def read(self, shard: str, row: int) -> tuple[str, dict[str, bytes]]:
        """Key and members of the sample ``row`` of a shard.

        Raises:
            SampleError: the bytes are not those of a whole, harmless sample.
            FileNotFoundError: the shard went away since the run began.
        """
        tar, idx = self._descriptors(shard)
        bounds = os.pread(idx, 2 * OFFSET_BYTES, row * OFFSET_BYTES)
        assert len(bounds) == 2 * OFFSET_BYTES, f"{shard} has no row {row}"
        start, end = struct.unpack("<QQ", bounds)
        data = os.pread(tar, end - start, start)
        if len(data) != end - start:
            raise SampleError(f"the tar ends at byte {start + len(data)}, within the sample")
        sample: RawSample | None = None
        for member in _members(io.BytesIO(data)):
            key, name = split_member_name(member.name)
            sample = sample or RawSample(key, start, end - start)
            if key != sample.key:
                raise SampleError(f"the byte range holds members of {sample.key} and {key}")
            _add_member(sample, name, member.data, member.problem)
        if sample is None:
            raise SampleError(f"no tar member at byte {start}")
        if sample.error is not None:
            raise SampleError(sample.error)
        return sample.key, sample.members

    def close(self) -> None:
        """Close all shards."""
        while self._open:
            self._close_oldest()

    def _descriptors(self, shard: str) -> tuple[int, int]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= OPEN_SHARDS:
            self._close_oldest()
        tar = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
        try:
            idx = os.open(offsets_path(shard), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(tar)
            raise
        self._open[shard] = (tar, idx)
        return tar, idx

    def _close_oldest(self) -> None:
        _, descriptors = self._open.popitem(last=False)
        for descriptor in descriptors:
            os.close(descriptor)


@dataclass(frozen=True)
class _Member:
    name: str
    offset: int  # byte of the header, extended headers included
    end: int  # byte behind the content, padding included
    data: bytes
    problem: str | None


def _members(file: io.BufferedReader | io.BytesIO) -> Iterator[_Member]:
    """Members other than folders, up to the end of the archive or its first damage."""
    end = 0
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (the caller owns the file)
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined] # tarfile remembers every member otherwise
            if member.size < 0 or tar.offset <= end:
                return  # a forged size would send the walk backwards for ever
            end = tar.offset
            if not member.isdir():
                data, problem = _content(file, member)
                yield _Member(member.name, member.offset, end, data, problem)
    except tarfile.ReadError:
        return


def _content(file: io.BufferedReader | io.BytesIO, member: tarfile.TarInfo) -> tuple[bytes, str | None]:
    if not member.isreg() or member.issparse():
        return b"", f"member {member.name!r} is not a regular file (links and devices are refused)"
    file.seek(member.offset_data)
    data = file.read(member.size)
    return data, None if len(data) == member.size else f"member {member.name!r} is cut off"


def _add_member(sample: RawSample, name: str, data: bytes, problem: str | None) -> None:
    if name in sample.members:
        problem = f"member .{name} appears twice"
    sample.members[name] = data
    sample.error = sample.error or problem
