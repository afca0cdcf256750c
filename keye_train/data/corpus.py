"""All sources of a recipe: how many samples, in which shards, and what each of them takes.

Opening reads one header a shard. Sizes of samples are measured when the plan first looks at them, and only the blocks
that a window touches stay in memory; see ``columns``. Keys and byte ranges stay on the disk until a sample is read.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from keye_train.data.columns import BlockStore, Measuring
from keye_train.data.filters import Filter
from keye_train.data.headers import kept_headers
from keye_train.data.index import ShardHeader, read_key, tokenizer_fingerprint
from keye_train.data.measure import Sizes, measure
from keye_train.data.overlong import Fitting
from keye_train.data.paths import find_shards, index_file
from keye_train.data.storage import is_url
from keye_train.sample import Fit, SampleRef
from keye_train.settings import ResolutionSettings, SourceSettings, StorageSettings

__all__ = ["Corpus", "Looked", "ShardSource", "Sizes", "Source", "measure"]

log = logging.getLogger(__name__)

_OLD_INDEX = (
    "data.sources.%s: %d of %d shards have no SHARD.tar.sizes of their index, e.g. %s: planning reads their parquet "
    "indexes, which is slow where there are many; keye-data index on these shards adds the files without indexing anew"
)

SCAN_ROWS = 8192
"""Rows looked at together when a source is searched for its first usable sample."""


@dataclass(frozen=True)
class Looked:
    """What is known of some samples."""

    sizes: Sizes  # [N]
    keep: np.ndarray  # [N] bool: passes the filter of the source
    errors: dict[int, str]  # place among the N -> why the sample cannot be trained on
    fits: np.ndarray | None = None  # [N, 2] int64, what is taken of overlong ones, see ``sample.Fit``; None: no policy


class Source:
    """One source, here with all sizes in memory: rows 0 .. N - 1 run through its shards in order."""

    max_epochs: int | None = None
    filter: str | None = None
    fitting: Fitting | None = None
    storage: StorageSettings | None = None
    _excluded: Mapping[int, str] = MappingProxyType({})  # row -> reason

    def __init__(
        self,
        name: str,
        headers: tuple[ShardHeader, ...],
        first_rows: np.ndarray,
        sizes: Sizes,
        errors: dict[int, str],
    ) -> None:
        """Args:
        name: in data.sources.
        headers: of its shards.
        first_rows: [shards + 1] int64, row of the source at which each shard starts.
        sizes: of all rows.
        errors: row -> why the sample cannot be trained on.
        """
        self.name, self.headers, self.first_rows = name, headers, first_rows
        self._sizes, self._errors = sizes, errors

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    @property
    def sizes(self) -> Sizes:
        """Of all rows: for tools and for small sources, never for planning."""
        return self.look(np.arange(len(self))).sizes

    @property
    def errors(self) -> dict[int, str]:
        """Row -> why the sample cannot be trained on, of all rows; see ``sizes``."""
        return self.look(np.arange(len(self))).errors

    @property
    def shards(self) -> tuple[str, ...]:
        """Paths of the shards."""
        return tuple(header.shard for header in self.headers)

    def look(self, rows: np.ndarray) -> Looked:
        """What is known of the samples at some rows of the source."""
        looked = self._measured(rows)
        return replace(looked, errors=looked.errors | _found(self._excluded, rows)) if self._excluded else looked

    def fits(self, rows: np.ndarray) -> list[Fit]:
        """What is taken of the samples at some rows."""
        found = self.look(rows).fits
        return [Fit()] * len(rows) if found is None else [Fit(*pair) for pair in found.tolist()]

    def exclude(self, reasons: Mapping[int, str]) -> None:
        """Give up the samples at some rows: row -> reason. They are still drawn, like those that cannot be read."""
        self._excluded = MappingProxyType({**self._excluded, **reasons})

    def _measured(self, rows: np.ndarray) -> Looked:
        return Looked(self._sizes.take(rows), np.ones(len(rows), dtype=bool), _found(self._errors, rows))

    def locate(self, row: int) -> tuple[str, int]:
        """Shard of a row of the source, and its row there."""
        shard = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        return self.headers[shard].shard, row - int(self.first_rows[shard])

    def ref(self, row: int) -> SampleRef:
        """Name of a sample; reads its key from the index, so not for every sample."""
        shard, shard_row = self.locate(row)
        return SampleRef(self.name, shard, read_key(shard, shard_row, self.storage))


class ShardSource(Source):
    """A source whose sizes are measured where a plan looks."""

    def __init__(
        self, name: str, headers: Sequence[ShardHeader], measuring: Measuring, max_epochs: int | None = None
    ) -> None:
        """Args:
        name: in data.sources.
        headers: of its shards.
        measuring: how rows of a shard are measured.
        max_epochs: how often its rows are drawn at most; None: without end.
        """
        self.name, self.headers, self.max_epochs = name, tuple(headers), max_epochs
        self.first_rows = np.cumsum([0] + [header.rows for header in headers])
        self.filter, self.storage = measuring.filter.text if measuring.filter else None, measuring.storage
        self.fitting = measuring.fitting
        self._store = BlockStore(self.shards, self.first_rows, measuring)

    def _measured(self, rows: np.ndarray) -> Looked:
        return Looked(*self._store.look(rows))


def _found(reasons: Mapping[int, str], rows: np.ndarray) -> dict[int, str]:
    """Place -> reason, for the rows that have one."""
    if not reasons:
        return {}
    places = np.flatnonzero(np.isin(rows, np.fromiter(reasons, dtype=np.int64, count=len(reasons)))).tolist()
    return {place: reasons[int(rows[place])] for place in places}


class Corpus:
    """The sources of a recipe, opened."""

    def __init__(self, sources: Mapping[str, Source], resolution: ResolutionSettings) -> None:
        self.sources = dict(sorted(sources.items()))
        self.resolution = resolution
        self.quarantine: str | None = None  # fingerprint of the samples that are left out, see data.quarantine

    @classmethod
    def open(
        cls,
        sources: Mapping[str, SourceSettings],
        tokenizer: str | Path,
        resolution: ResolutionSettings,
        pair_tokens: int | None = None,
        storage: StorageSettings | None = None,
        cache: str | Path | None = None,
        group_blocks: int = 0,
        fittings: Mapping[str, Fitting | None] = MappingProxyType({}),
    ) -> Corpus:
        """Open the index of every shard.

        Args:
            sources: name -> shards.
            tokenizer: folder of the tokenizer that the indexes must have been made with.
            resolution: decides what media cost.
            pair_tokens: for image-caption pairs (Stage 0): caption tokens that every sample takes, whatever its text;
                samples that are not one image with a text count as unreadable.
            storage: ``data.storage``.
            cache: folder that keeps headers and measured sizes; see ``data.plan_cache``.
            group_blocks: blocks that windows come from, see ``columns``.
            fittings: source -> what becomes of its samples over a budget, see ``overlong``.

        Raises:
            ValueError: a shard is missing, its index is missing, stale or foreign, or a filter cannot be read.
        """
        fingerprint = tokenizer_fingerprint(tokenizer)
        folder = None if cache is None else Path(cache)
        opened = {}
        for name, settings in sources.items():
            own = Filter(settings.filter, f"data.sources.{name}.filter") if settings.filter else None
            headers = kept_headers(find_shards(settings.shards, storage), tokenizer, fingerprint, storage, folder)
            without = [header.shard for header in headers if not header.has_sizes]
            if without:
                log.warning(_OLD_INDEX, name, len(without), len(headers), without[0])
            kept = [one for one in headers if folder and (not one.has_sizes or is_url(index_file(one.shard, storage)))]
            rows_from = {header.shard: header.rows_from for header in kept}
            fitting = fittings.get(name)
            measuring = Measuring(
                resolution, pair_tokens, own, folder, rows_from, frozenset(without), storage, fitting, group_blocks
            )
            opened[name] = ShardSource(name, headers, measuring, settings.max_epochs)
        return cls(opened, resolution)

    def fingerprint(self) -> str:
        """sha256 over sources, filters, policies, shard checksums, resolution and quarantine; the same for the same
        data elsewhere."""
        digest = hashlib.sha256(repr(sorted(asdict(self.resolution).items())).encode())
        for name, source in self.sources.items():
            digest.update(repr((name, source.filter, source.max_epochs)).encode())
            if source.fitting is not None:
                digest.update(repr(source.fitting).encode())
            for header in source.headers:
                digest.update(repr((header.rows, header.shard_bytes, *header.rows_from)).encode())
        if self.quarantine is not None:
            digest.update(self.quarantine.encode())
        return digest.hexdigest()

    def describe(self) -> dict[str, dict[str, Any]]:
        """Of each source: number of shards and samples, bytes, and a sha256 over the checksums of its shards."""
        described = {}
        for name, source in self.sources.items():
            digest = hashlib.sha256()
            for header in source.headers:
                digest.update(header.sha256.encode())
            described[name] = {
                "shards": len(source.headers),
                "samples": len(source),
                "bytes": sum(header.shard_bytes for header in source.headers),
                "sha256": digest.hexdigest(),
            }
        return described
