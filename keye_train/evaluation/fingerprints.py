"""What a model consists of, as one SHA-256, without reading files again that have not changed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keye_train.runs import file_sha256, read_json, write_json_atomic

FILES = "files.json"


class FileHashes:
    """SHA-256 of files; kept on the disk as long as a file is there, with size, times and inode of its last reading.

    The kernel sets the time of change (ctime) itself, so a file of old bytes and an old time stamp is read as well.
    """

    def __init__(self, cache: Path) -> None:
        """Args:
        cache: folder; ``cache / "files.json"`` keeps what is known.
        """
        self._store = cache / FILES
        self._known: dict[str, dict[str, Any]] = read_json(self._store) if self._store.exists() else {}

    def __call__(self, file: Path) -> str:
        """SHA-256 of a file, in hexadecimal."""
        stat = file.stat()
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        known = self._known.get(str(file.resolve()))
        if known is None or known["state"] != state:
            known = {"state": state, "sha256": file_sha256(file)}
            there = {name: own for name, own in self._known.items() if Path(name).exists()}  # or it would only grow
            self._known = there | {str(file.resolve()): known}
            write_json_atomic(self._store, self._known)
        return str(known["sha256"])


def model_fingerprint(documents: Sequence[Path], weights: Sequence[Path], hashes: FileHashes) -> str:
    """SHA-256 over names and contents of files.

    Args:
        documents: small ones, read each time.
        weights: read where ``hashes`` does not know them.
    """
    listed = [(file.name, file_sha256(file)) for file in documents]
    listed += [(file.name, hashes(file)) for file in weights]
    digest = hashlib.sha256()
    for name, sha256 in sorted(listed):
        digest.update(f"{name}:{sha256}\n".encode())
    return digest.hexdigest()
