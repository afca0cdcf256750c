"""What a checkpoint folder holds, told from the headers of its files: any safetensors, not only Keye's."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from keye_train.model.weight_files import TensorInfo, list_tensors

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass
class Summary:
    """Tensors of one module."""

    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    dtypes: Counter[str] = field(default_factory=Counter)  # data type -> tensors

    def add(self, info: TensorInfo) -> None:
        """Count one tensor."""
        size = math.prod(info.shape)
        self.tensors += 1
        self.parameters += size
        self.bytes += size * DTYPE_BYTES.get(info.dtype, 1)  # the 8-bit floats take one
        self.dtypes[info.dtype] += 1


def summarize(tensors: dict[str, TensorInfo], depth: int) -> dict[str, Summary]:
    """Tensors by the first ``depth`` parts of their names; the layers of a stack count as one, ``layers.*``."""
    found: dict[str, Summary] = {}
    for name, info in tensors.items():
        parts = re.sub(r"\.\d+\.", ".*.", name).split(".")[:-1] or [name]
        found.setdefault(".".join(parts[:depth]), Summary()).add(info)
    return found


def describe(folder: Path, depth: int = 3, every: bool = False) -> str:
    """A table of modules, or of every tensor, and the total.

    Raises:
        FileNotFoundError, ValueError: as ``list_tensors``.
    """
    tensors = list_tensors(folder)
    total = Summary()
    for info in tensors.values():
        total.add(info)
    if every:
        rows = [(name, str(list(info.shape)), info.dtype, info.file) for name, info in tensors.items()]
        head: tuple[str, ...] = ("tensor", "shape", "data type", "file")
    else:
        modules = summarize(tensors, depth) | {"total": total}
        rows = [
            (name, f"{row.tensors:,}", f"{row.parameters:,}", f"{row.bytes / 2**20:,.1f} MiB, {'+'.join(row.dtypes)}")
            for name, row in modules.items()
        ]
        head = ("module", "tensors", "parameters", "size")
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
    files = len({info.file for info in tensors.values()})
    return "\n".join([*lines, f"{total.tensors:,} tensors, {total.parameters:,} parameters in {files} files"])
