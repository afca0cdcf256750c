"""Promise: the file of sizes tells what the parquet index tells, costs one small read a block, and is never stale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_commands import keye_data
from toy_shards import mixed_samples

from keye_train.data import columns
from keye_train.data.columns import BlockStore, Measuring
from keye_train.data.corpus import Corpus
from keye_train.data.facts import FACT_COLUMNS, KINDS, MEDIUM, Facts
from keye_train.data.grids import media_sizes
from keye_train.data.index import SCHEMA, read_columns, read_sizes
from keye_train.data.measure import measure
from keye_train.data.opening import open_header
from keye_train.data.paths import index_path, sizes_file
from keye_train.data.sizes_file import BLOCK_ROWS, DamagedError, SizesFile, sizes_bytes
from keye_train.data.storage import Storage
from keye_train.model.positions import grid_tokens, media_grid
from keye_train.sample import MediaInfo, SampleError
from keye_train.settings import ResolutionSettings, SourceSettings

MakeShard = Callable[..., Path]

SIDES = st.one_of(st.integers(-1, 40), st.integers(1, 3000), st.integers(1, 2**31 - 1))
MEDIA = st.tuples(
    st.integers(0, len(KINDS) - 1),
    SIDES,
    SIDES,
    st.integers(-1, 5000),
    st.sampled_from([0.0, -1.0, 0.5, 12.5, 23.976, 30.0, float("nan"), float("inf")]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(MEDIA, max_size=40), st.integers(1, 64), st.integers(0, 400), st.integers(1, 40), st.floats(0.1, 10))
def test_whole_columns_cost_what_one_medium_costs(
    media: list[tuple[int, int, int, int, float]], least: int, more: int, frame: int, fps: float
) -> None:
    resolution = ResolutionSettings(
        image_min_tokens=least,
        image_max_tokens=least + more,
        video_frame_min_tokens=frame,
        video_frame_max_tokens=frame + more,
        video_max_tokens=frame * 20 + more,
        video_fps=fps,
    )
    tokens, patches, errors = media_sizes(np.array(media, dtype=MEDIUM), resolution)
    for place, (kind, *sides) in enumerate(media):
        try:
            expected = grid_tokens(media_grid(MediaInfo(KINDS[kind], *sides), resolution))
            reason = None
        except SampleError as error:
            expected, reason = 0, str(error)
        assert errors.get(place) == reason
        assert (tokens[place], patches[place]) == (expected, 4 * expected)


def table_of(rows: int) -> pa.Table:
    """An index with several tasks, errors, cuts and numbers of media."""
    image = {"kind": "image", "width": 640, "height": 480, "frames": 1, "fps": 0.0}
    video = {"kind": "video", "width": 320, "height": 240, "frames": 90, "fps": 29.97}
    values = [
        {
            "key": f"{row}",
            "offset": row * 1024,
            "size": row + 2**33,
            "text_tokens": row,
            "media": [image | {"width": 100 + row}, video][: row % 3],
            "cuts": [{"text_tokens": 5, "media": 1}] * (row % 2),
            "task": f"task {row % 5 + row // 200}",
            "error": "caf\u00e9: no picture" if row % 97 == 3 else None,
        }
        for row in range(rows)
    ]
    return pa.Table.from_pylist(values, schema=SCHEMA)


def same(left: Facts, right: Facts) -> None:
    """Tasks may be numbered otherwise."""
    for name in ("text_tokens", "media", "cuts", "size"):
        assert np.array_equal(left.rows[name], right.rows[name])
    assert np.array_equal(left.media, right.media)
    assert np.array_equal(left.cuts, right.cuts)
    assert [left.tasks[task] for task in left.rows["task"]] == [right.tasks[task] for task in right.rows["task"]]
    assert left.errors == right.errors


@pytest.mark.parametrize("remote", [False, True])
def test_any_rows_are_those_of_the_index(tmp_path: Path, remote: bool) -> None:
    table = table_of(5 * BLOCK_ROWS + 7)
    shard = f"{tmp_path}/a.tar"
    Path(sizes_file(shard)).write_bytes(sizes_bytes(table, {"rows": len(table)}))
    spans = [(0, 1), (100, 130), (2 * BLOCK_ROWS, 3 * BLOCK_ROWS), (len(table) - 1, len(table))]
    read = read_sizes([(f"file://{shard}" if remote else shard, spans)] * 2, Storage())
    rows = [row for start, stop in spans for row in range(start, stop)] * 2
    same(read, Facts.of(table.take(rows)))
    assert read.media_of(31) == Facts.of(table.slice(rows[31], 1)).media_of(0)
    assert Path(sizes_file(shard)).stat().st_size < 40 * len(table)


@pytest.mark.parametrize(("block", "kept", "part"), [(7, 70, 21), (50, 300, 100), (128, 10**6, 10**6)])
def test_looks_in_any_order_find_what_is_measured_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, kept: int, part: int
) -> None:
    """Shards without rows, blocks over several shards, blocks that were forgotten, looks at nothing."""
    for name, value in (("BLOCK_ROWS", block), ("KEPT_ROWS", kept), ("PART_ROWS", part)):
        monkeypatch.setattr(columns, name, value)
    counts = [0, 3, 150, BLOCK_ROWS, 0, 1, 2, 300, 0]
    shards = [f"{tmp_path}/{number}.tar" for number in range(len(counts))]
    table, first_rows = table_of(sum(counts)), np.cumsum([0, *counts])
    for shard, start, count in zip(shards, first_rows.tolist(), counts, strict=False):
        Path(sizes_file(shard)).write_bytes(sizes_bytes(table.slice(start, count), {}))
    expected, reasons = measure(Facts.of(table), ResolutionSettings())
    assert reasons
    store = BlockStore(shards, first_rows, Measuring(ResolutionSettings()))
    rng = np.random.default_rng(0)
    for count in (0, 1, 3, 40, len(table), 3 * len(table)):
        rows = rng.integers(0, len(table), count)
        sizes, keep, errors, fits = store.look(rows)
        for name in ("tokens", "tokens_squared", "patches", "patches_squared"):
            np.testing.assert_array_equal(getattr(sizes, name), getattr(expected, name)[rows])
        assert errors == {place: reasons[row] for place, row in enumerate(rows.tolist()) if row in reasons}
        assert keep.all()
        assert fits is None
        assert len(store) <= max(kept, part) // block


def test_every_damage_is_noticed(tmp_path: Path) -> None:
    table = table_of(300)
    shard, whole = str(tmp_path / "a.tar"), sizes_bytes(table, {"rows": 300})
    path = Path(sizes_file(shard))
    for size in range(0, len(whole), 37):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedError, match=r"a\.tar\.sizes"):
            SizesFile(str(path), Storage())
    path.write_bytes(whole)
    for rows in ((290, 301), (0, 400), (500, 501)):  # in its last block, behind that, and behind its directory
        with pytest.raises(ValueError, match=rf"a\.tar\.sizes has no row {rows[1] - 1}: .*: delete .* keye-data index"):
            read_sizes([(shard, [rows])], Storage())
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    assert len(read_sizes([(shard, [(0, BLOCK_ROWS)])], Storage())) == BLOCK_ROWS  # another block
    with pytest.raises(ValueError, match=r"block 2 of .*a\.tar\.sizes is damaged: delete .* keye-data index"):
        read_sizes([(shard, [(290, 300)])], Storage())
    directory = whole.index(b"}") + 1
    for byte in range(directory, directory + 48):
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 0x81]) + whole[byte + 1 :])
        with pytest.raises(ValueError, match=r"a\.tar\.sizes"):
            read_sizes([(shard, [(0, 300)])], Storage())


def test_an_index_without_it_is_read_slowly_and_gets_it(
    tmp_path: Path, make_shard: MakeShard, tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard = make_shard(tmp_path / "a.tar", mixed_samples(6))
    path, indexed = Path(sizes_file(shard)), index_path(shard).read_bytes()
    written = path.read_bytes()

    def opened() -> Corpus:
        return Corpus.open({"one": SourceSettings([str(shard)])}, tokenizer_dir, ResolutionSettings())

    quick = opened()
    sizes = quick.sources["one"].sizes
    assert not [record for record in caplog.records if record.name.startswith("keye_train")]
    path.unlink()
    slow = opened()
    assert "1 of 1 shards have no SHARD.tar.sizes" in caplog.text
    assert quick.fingerprint() == slow.fingerprint()
    for column in ("tokens", "patches", "patches_squared"):
        assert np.array_equal(getattr(sizes, column), getattr(slow.sources["one"].sizes, column))
    assert keye_data("index", shard, "--tokenizer", tokenizer_dir) == 0
    assert path.read_bytes() == written
    assert index_path(shard).read_bytes() == indexed


def test_one_of_another_index_is_not_believed(tmp_path: Path, make_shard: MakeShard, tokenizer_dir: Path) -> None:
    shard = make_shard(tmp_path / "a.tar", mixed_samples(6))
    other = make_shard(tmp_path / "b.tar", mixed_samples(5))
    header = open_header(str(shard), tokenizer_dir)
    assert header.has_sizes
    Path(sizes_file(other)).replace(sizes_file(shard))
    assert open_header(str(shard), tokenizer_dir) == replace(header, has_sizes=False)
    assert Facts.of(read_columns(str(shard), FACT_COLUMNS)).rows.shape == (6,)
