"""What plans need of the rows of an index, as numpy columns: the same from the parquet file and from ``sizes_file``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from keye_train.sample import MediaInfo, MediaKind

ROW = np.dtype([("text_tokens", "<i4"), ("media", "<u4"), ("cuts", "<u4"), ("task", "<u2"), ("size", "<i8")])
MEDIUM = np.dtype([("kind", "u1"), ("width", "<i4"), ("height", "<i4"), ("frames", "<i4"), ("fps", "<f8")])
CUT = np.dtype([("text_tokens", "<i4"), ("media", "<i4")])

KINDS = tuple(MediaKind)
"""Behind the numbers in MEDIUM."""

FACT_COLUMNS = ("text_tokens", "media", "cuts", "task", "size", "error")
"""Columns of the index that facts are made of; where cuts, task or size is missing, it is left empty."""


@dataclass(frozen=True)
class Facts:
    """Some rows of one or many indexes."""

    rows: np.ndarray  # [n] of ROW: media and cuts are how many it has, task is a place in ``tasks``
    media: np.ndarray  # [media] of MEDIUM, those of the first row first, as its conversation mentions them
    cuts: np.ndarray  # [cuts] of CUT, see ``index.SCHEMA``
    tasks: tuple[str, ...] = ("",)
    errors: Mapping[int, str] = field(default_factory=dict)  # row -> why the sample cannot be read

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, table: pa.Table) -> Facts:
        """Those of an index, or of a part of it, with some or all of ``FACT_COLUMNS``."""
        rows = np.zeros(len(table), dtype=ROW)
        rows["text_tokens"] = table["text_tokens"].to_numpy()
        media, cuts = _flat(table, "media", MEDIUM, rows), _flat(table, "cuts", CUT, rows)
        tasks: tuple[str, ...] = ("",)
        if "size" in table.column_names:
            rows["size"] = table["size"].to_numpy()
        if "task" in table.column_names:
            encoded = table["task"].combine_chunks().dictionary_encode()
            if len(encoded.dictionary) > np.iinfo(ROW["task"]).max:
                raise ValueError(f"an index has {len(encoded.dictionary)} different tasks; 65,535 is the limit")
            rows["task"], tasks = encoded.indices.to_numpy(), tuple(encoded.dictionary.to_pylist())
        wrong = pc.indices_nonzero(pc.is_valid(table["error"])).to_pylist()
        return cls(rows, media, cuts, tasks, {row: table["error"][row].as_py() for row in wrong})

    @classmethod
    def joined(cls, parts: Sequence[Facts]) -> Facts:
        """One behind the other; at least one."""
        if len(parts) == 1:
            return parts[0]
        rows = stacked([part.rows for part in parts])
        numbers: dict[str, int] = {}
        if any(part.tasks != parts[0].tasks for part in parts):
            codes = [np.array([numbers.setdefault(task, len(numbers)) for task in part.tasks], int) for part in parts]
            rows["task"] = np.concatenate([own[part.rows["task"]] for own, part in zip(codes, parts, strict=True)])
        errors: dict[int, str] = {}
        first = 0
        for part in parts:
            if part.errors:
                errors |= {first + row: reason for row, reason in part.errors.items()}
            first += len(part.rows)
        media, cuts = (stacked([getattr(part, name) for part in parts]) for name in ("media", "cuts"))
        return cls(rows, media, cuts, tuple(numbers) or parts[0].tasks, errors)

    def blocks(self, rows: int) -> Iterator[Facts]:
        """The same cut into blocks of so many rows, each with the tasks that it has, in order of appearance."""
        behind = {name: np.cumsum(self.rows[name], dtype=np.int64) for name in ("media", "cuts")}
        errors: dict[int, dict[int, str]] = {}
        for row, reason in self.errors.items():
            errors.setdefault(row // rows, {})[row % rows] = reason
        first = dict.fromkeys(behind, 0)
        for start in range(0, len(self), rows):
            own = self.rows[start : start + rows].copy()
            ends = {name: int(places[start + len(own) - 1]) for name, places in behind.items()}
            tasks = dict.fromkeys(own["task"].tolist())
            places = np.zeros(max(tasks) + 1, dtype=ROW["task"])
            places[[*tasks]] = range(len(tasks))
            own["task"] = places[own["task"]]
            yield Facts(
                own,
                self.media[first["media"] : ends["media"]],
                self.cuts[first["cuts"] : ends["cuts"]],
                tuple(self.tasks[task] for task in tasks),
                errors.get(start // rows, {}),
            )
            first = ends

    def where(self, keep: np.ndarray) -> Facts:
        """The rows of a mask, [n] bool."""
        if keep.all():
            return self
        places = np.cumsum(keep) - 1
        return Facts(
            _chosen(self.rows, keep),
            _chosen(self.media, np.repeat(keep, self.rows["media"])),
            _chosen(self.cuts, np.repeat(keep, self.rows["cuts"])),
            self.tasks,
            {int(places[row]): reason for row, reason in self.errors.items() if keep[row]},
        )

    def media_of(self, row: int) -> list[MediaInfo]:
        """Images and videos of one row."""
        first = int(self.rows["media"][:row].sum())
        own = self.media[first : first + int(self.rows["media"][row])].tolist()
        return [MediaInfo(KINDS[kind], *sides) for kind, *sides in own]

    def cuts_of(self, row: int) -> list[tuple[int, int]]:
        """Text tokens and media up to the end of each answer behind which a row can be cut."""
        first = int(self.rows["cuts"][:row].sum())
        return [tuple(cut) for cut in self.cuts[first : first + int(self.rows["cuts"][row])].tolist()]


def stacked(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Records of one type, one array behind the other: numpy's own way compares the names of all fields each time."""
    return np.concatenate([part.view(np.uint8) for part in parts]).view(parts[0].dtype)


def _chosen(records: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """The records of a mask, each copied in one piece: numpy's own way copies field by field, ten times slower."""
    return records.view(f"V{records.dtype.itemsize}")[keep].view(records.dtype)


def _flat(table: pa.Table, name: str, kind: np.dtype, rows: np.ndarray) -> np.ndarray:
    """The items of a column of lists; their numbers go to ``rows``."""
    if name not in table.column_names:
        return np.zeros(0, dtype=kind)
    lists = table[name].combine_chunks()
    rows[name] = pc.list_value_length(lists).to_numpy()
    items = lists.flatten()
    flat = np.zeros(len(items), dtype=kind)
    for own in kind.names or ():
        column = items.field(own)
        if own == "kind":
            column = pc.index_in(column, pa.array([one.value for one in KINDS]))
        flat[own] = column.to_numpy()
    return flat
