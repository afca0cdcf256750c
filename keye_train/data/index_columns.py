"""The columns of an index while they grow: numbers side by side, no object for each row, medium or cut."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from keye_train.data.index import SCHEMA
from keye_train.sample import MediaInfo, MediaKind

_WORDS = {kind: kind.value for kind in MediaKind}


class IndexColumns:
    """Columns of ``index.SCHEMA``."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._tasks: list[str] = []
        self._errors: list[str | None] = []
        self.bad = 0
        """Rows with an error."""
        self._offsets, self._sizes, self._text_tokens = array("q"), array("q"), array("q")
        self._kinds: list[str] = []
        self._widths, self._heights, self._frames, self._fps = array("q"), array("q"), array("q"), array("d")
        self._media_ends, self._cut_ends = array("i", [0]), array("i", [0])
        self._cut_tokens, self._cut_media = array("q"), array("q")

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: str, offset: int, size: int, task: str, error: str | None) -> None:
        """A row, but for its text and media; ``offset`` and ``size`` in bytes of the shard."""
        self._keys.append(key)
        self._offsets.append(offset)
        self._sizes.append(size)
        self._tasks.append(task)
        self._errors.append(error)
        self.bad += error is not None

    def add_contents(self, text_tokens: int, cuts: Sequence[tuple[int, int]], media: Sequence[MediaInfo]) -> None:
        """Text and media of the next row.

        Args:
            text_tokens, cuts: see ``chat.TextSize``.
            media: in the order of the conversation.
        """
        self._text_tokens.append(text_tokens)
        for tokens, slots in cuts:
            self._cut_tokens.append(tokens)
            self._cut_media.append(slots)
        self._cut_ends.append(len(self._cut_tokens))
        for info in media:
            self._kinds.append(_WORDS[info.kind])
            self._widths.append(info.width)
            self._heights.append(info.height)
            self._frames.append(info.frames)
            self._fps.append(info.fps)
        self._media_ends.append(len(self._kinds))

    def offsets(self) -> np.ndarray:
        """First byte of each row, and the byte behind the last one: [rows + 1] uint64; [0] where there are none."""
        last = self._offsets[-1] + self._sizes[-1] if self._offsets else 0
        return np.array([*self._offsets, last], dtype="<u8")

    def table(self, metadata: Mapping[str, str]) -> pa.Table:
        """The index."""
        media = [pa.array(self._kinds, pa.string()), *map(_numbers, (self._widths, self._heights, self._frames))]
        media.append(_numbers(self._fps))
        columns = [
            pa.array(self._keys, pa.string()),
            _numbers(self._offsets),
            _numbers(self._sizes),
            _numbers(self._text_tokens),
            _lists("media", self._media_ends, media),
            _lists("cuts", self._cut_ends, [_numbers(self._cut_tokens), _numbers(self._cut_media)]),
            pa.array(self._tasks, pa.string()),
            pa.array(self._errors, pa.string()),
        ]
        cast = [column.cast(field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        return pa.table(cast, schema=SCHEMA.with_metadata(dict(metadata)))


def _numbers(values: array) -> pa.Array:
    return pa.array(np.frombuffer(values, dtype=values.typecode))


def _lists(name: str, ends: array, children: Sequence[pa.Array]) -> pa.Array:
    """A column of lists of records: those of row n are the children's [ends[n], ends[n + 1])."""
    kind = SCHEMA.field(name).type
    own = list(kind.value_type)
    cast = [child.cast(field.type) for child, field in zip(children, own, strict=True)]
    return pa.ListArray.from_arrays(_numbers(ends), pa.StructArray.from_arrays(cast, fields=own), type=kind)
