"""Write WebDataset shards: whole or not at all, and the same bytes from the same samples."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from webdataset import TarWriter

from keye_train.data.formats import REFUSED_SUFFIXES, split_member_name
from keye_train.data.paths import index_path, offsets_path, sizes_file

KEY_DIGITS = 9


@dataclass(frozen=True)
class WrittenShard:
    """What was written."""

    path: Path
    samples: int
    size_bytes: int
    sha256: str


def sample_key(number: int, prefix: str = "") -> str:
    """Key of a sample; zero-padded, so that names sort as numbers."""
    return f"{prefix}{number:0{KEY_DIGITS}d}"


def write_shard(path: str | Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> WrittenShard:
    """Write a shard aside, flush it to the disk, then rename it. An index of an older shard of that name is removed.

    Args:
        path: the .tar to write.
        samples: key and members (name without the key, e.g. ``json`` or ``0.jpg`` -> bytes) of each sample. Members
            are written in the order of their names.

    Raises:
        ValueError: a key or member name that readers would refuse, or a key that comes twice.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    keys: set[str] = set()
    try:
        with aside.open("wb") as file:
            stream = _HashingFile(file)
            # Fixed times and owners: the bytes depend on the samples alone.
            with TarWriter(stream, mtime=0, user="", group="", encoder=False) as tar:
                for key, members in samples:
                    _check_names(key, members, keys)
                    tar.write({"__key__": key, **members})
            file.flush()
            os.fsync(file.fileno())
        _remove_index(path)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return WrittenShard(path, len(keys), stream.size_bytes, stream.sha256)


def remove_shard(path: Path) -> None:
    """Remove a shard with its index."""
    _remove_index(path)
    path.unlink()


def _remove_index(path: Path) -> None:
    for stale in (index_path(path), offsets_path(path), Path(sizes_file(path))):
        stale.unlink(missing_ok=True)


def write_shards(
    folder: str | Path,
    name: str,
    samples: Iterable[tuple[str, Mapping[str, bytes]]],
    max_samples: int,
    max_bytes: int,
) -> Iterator[WrittenShard]:
    """Spread samples over shards ``NAME-00000.tar``, ``NAME-00001.tar``, ...; yields each when it stands on the disk.

    Args:
        folder: where the shards go.
        name: common start of their names.
        samples: as for ``write_shard``.
        max_samples, max_bytes: a shard is closed before it exceeds either; a single sample may exceed ``max_bytes``.
    """
    waiting = _Peekable(samples)
    number = 0
    while waiting.current is not None:
        yield write_shard(Path(folder) / f"{name}-{number:05d}.tar", waiting.take(max_samples, max_bytes))
        number += 1


def written_shards(folder: Path, name: str) -> set[Path]:
    """The shards that ``write_shards`` has written there under this name; not those of NAME-MORE."""
    pattern = re.compile(re.escape(name) + r"-\d{5,}\.tar")
    return {path for path in folder.glob("*.tar") if pattern.fullmatch(path.name)}


class _Peekable:
    """An iterator of samples whose next one can be looked at."""

    def __init__(self, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
        self._samples = iter(samples)
        self.current = next(self._samples, None)

    def take(self, max_samples: int, max_bytes: int) -> Iterator[tuple[str, Mapping[str, bytes]]]:
        """The next samples, at least one, up to either limit."""
        count = size_bytes = 0
        while self.current is not None:
            size_bytes += sum(len(data) for data in self.current[1].values())
            if count and (count >= max_samples or size_bytes > max_bytes):
                return
            count += 1
            yield self.current
            self.current = next(self._samples, None)


class _HashingFile(io.RawIOBase):
    """Passes writes on and takes their checksum."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes) -> int:  # type: ignore[override] # tarfile writes bytes only
        self._digest.update(data)
        self.size_bytes += len(data)
        return self._file.write(data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def _check_names(key: str, members: Mapping[str, bytes], keys: set[str]) -> None:
    if key in keys:
        raise ValueError(f"the key {key!r} comes twice in one shard")
    keys.add(key)
    if not members:
        raise ValueError(f"sample {key!r} has no members")
    for name in members:
        if split_member_name(f"{key}.{name}") != (key, name):
            raise ValueError(f"key {key!r}: a key has no dot in its last part, since the first dot ends it")
        if name.rpartition(".")[2].lower() in REFUSED_SUFFIXES:
            raise ValueError(f"sample {key!r}: members .{name} are refused by the readers")
