"""Samples out of the bytes of a tar: the whole archive in order, or one sample by its byte range.

Both ways give the same bytes, because both read the same headers with the same code and take regular files only. Plain
headers, nearly all of a shard, are read here; anything else (long names, extended headers, links, damage) is left to
``tarfile``, whose view of an archive is the rule.
"""

from __future__ import annotations

import io
import mmap
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from keye_train.data.formats import split_member_name
from keye_train.sample import SampleError

Translate = Callable[[dict[str, bytes]], dict[str, bytes]]
"""Members of one sample in the layout of a prepared folder -> members in a layout of ``formats``."""

_BLOCK = tarfile.BLOCKSIZE
# Name, size in eleven octal digits and what ends it, checksum, type, first byte of the prefix of a long name.
_HEADER = struct.Struct("100s 24x 11s c 12x 8s c 188x c 166x")


@dataclass
class RawSample:
    """Members of one sample as they stand in the tar."""

    key: str
    offset: int  # byte of the first header
    size: int  # bytes up to the end of the last member, padding included
    members: dict[str, bytes] = field(default_factory=dict)  # name without the key -> bytes
    error: str | None = None  # why the sample cannot be read


def walk_shard(path: str | Path, translate: Translate | None = None) -> Iterator[RawSample]:
    """All samples of a local tar in order, damaged ones included.

    Members that follow each other with the same key are one sample. Where the archive itself is damaged, the rest of
    it comes as one last sample with an error, so that its loss does not go unnoticed.
    """
    total = Path(path).stat().st_size
    if total == 0:
        yield RawSample("byte-0", 0, 0, error="the tar is damaged at byte 0")
        return
    current: RawSample | None = None
    end = 0  # of what could be read
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for member in _members(data, file):
            end = min(member.end, total)
            problem = member.problem
            try:
                key, name = split_member_name(member.name)
            except SampleError as error:
                key = name = member.name.encode("utf-8", "backslashreplace").decode()
                problem = str(error)
            if current is None or key != current.key:
                if current is not None:
                    yield _finished(current, translate)
                current = RawSample(key, member.offset, 0)
            _add_member(current, name, member.data, problem)
            current.size = end - current.offset
        if current is not None:
            yield _finished(current, translate)
        if data[end : end + _BLOCK].strip(b"\0"):
            yield RawSample(f"byte-{end}", end, total - end, error=f"the tar is damaged at byte {end}")


def read_sample(data: bytes, translate: Translate | None = None) -> RawSample:
    """The one sample whose members are ``data``.

    Raises:
        SampleError: the bytes are not those of a whole, harmless sample.
    """
    sample: RawSample | None = None
    for member in _members(data, io.BytesIO(data)):
        key, name = split_member_name(member.name)
        sample = sample or RawSample(key, 0, len(data))
        if key != sample.key:
            raise SampleError(f"the byte range holds members of {sample.key} and {key}")
        _add_member(sample, name, member.data, member.problem)
    if sample is None:
        raise SampleError("no tar member where the index says one starts")
    sample = _finished(sample, translate)
    if sample.error is not None:
        raise SampleError(sample.error)
    return sample


def _finished(sample: RawSample, translate: Translate | None) -> RawSample:
    if translate is not None and sample.error is None:
        try:
            sample.members = translate(sample.members)
        except SampleError as error:
            sample.error = str(error)
    return sample


def _add_member(sample: RawSample, name: str, data: bytes, problem: str | None) -> None:
    if name in sample.members:
        problem = f"member .{name} appears twice"
    sample.members[name] = data
    sample.error = sample.error or problem


# ------------------------------------------------------------------------------------------------------ members


class _Member(NamedTuple):
    name: str
    offset: int  # byte of the header, extended headers included
    end: int  # byte behind the content, padding included
    data: bytes
    problem: str | None


def _members(data: bytes | mmap.mmap, file: io.BytesIO | io.BufferedReader) -> Iterator[_Member]:
    """Members other than folders, up to the end of the archive or its first damage.

    Args:
        data, file: the archive twice: to take slices of, and for ``tarfile``.
    """
    position = 0
    while True:
        header = data[position : position + _BLOCK]
        plain = _plain_header(header)
        if plain is not None:
            name, size = plain
            start = position + _BLOCK
            content = data[start : start + size]
            problem = None if len(content) == size else f"member {name!r} is cut off"
            end = start + -(-size // _BLOCK) * _BLOCK
            yield _Member(name, position, end, content, problem)
            position = end
            continue
        # Global headers hold for all that follows, so from there on tarfile keeps the archive.
        for member, offset, keep in _unusual_members(file, position):
            if member is not None:
                yield member
            position = offset
            if not keep:
                break
        else:
            return


def _plain_header(header: bytes) -> tuple[str, int] | None:
    """Name and size of a regular file; None for every header that is not of the plainest kind."""
    if len(header) != _BLOCK:
        return None
    name, digits, behind, written, kind, prefix = _HEADER.unpack(header)
    if kind != b"0" or prefix != b"\0" or (behind != b"\0" and behind != b" "):
        return None
    try:
        size, checksum = int(digits, 8), int(written.rstrip(b"\0 "), 8)
    except ValueError:
        return None
    if size < 0 or _byte_sum(header) != checksum:
        return None
    return name.partition(b"\0")[0].decode("utf-8", "surrogateescape"), size


def _byte_sum(header: bytes) -> int:
    """Sum of the 512 bytes of a header, those of its checksum taken as spaces.

    The lower half of Adler-32 is 1 + the sum of the bytes modulo 65,521, which 256 bytes cannot reach.
    """
    before, kinds, names = zlib.adler32(header[:148]), zlib.adler32(header[156:412]), zlib.adler32(header[412:])
    return (before & 0xFFFF) + (kinds & 0xFFFF) + (names & 0xFFFF) - 3 + 8 * 0x20


def _unusual_members(file: io.BytesIO | io.BufferedReader, position: int) -> Iterator[tuple[_Member | None, int, bool]]:
    """Members as ``tarfile`` sees them from ``position`` on.

    Yields:
        Member (None for a folder), byte behind it, and whether global headers are in force.
    """
    end = position
    file.seek(position)
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (the caller owns the file)
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined] # tarfile remembers every member otherwise
            if member.size < 0 or tar.offset <= end:
                return  # a forged size would send the walk backwards for ever
            end = tar.offset
            found = None
            if not member.isdir():
                data, problem = _content(file, member)
                found = _Member(member.name, member.offset, end, data, problem)
            yield found, end, bool(tar.pax_headers)
    except tarfile.ReadError:
        return


def _content(file: io.BytesIO | io.BufferedReader, member: tarfile.TarInfo) -> tuple[bytes, str | None]:
    if not member.isreg() or member.issparse():
        return b"", f"member {member.name!r} is not a regular file (links and devices are refused)"
    file.seek(member.offset_data)
    data = file.read(member.size)
    return data, None if len(data) == member.size else f"member {member.name!r} is cut off"
