"""Promise: what is drawn follows unit, epochs and filters of the recipe, and how it is measured does not matter."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_shards import toy_resolution, toy_settings
from transformers import PreTrainedTokenizerFast

from keye_train.data import columns, opening
from keye_train.data.blocks import BlockShuffle, row_order
from keye_train.data.corpus import Corpus, Looked, Sizes, Source
from keye_train.data.cost import PackCost
from keye_train.data.draw import Draw, DrawRules
from keye_train.data.filters import COLUMNS, Filter
from keye_train.data.index import ShardHeader, read_columns, tokenizer_fingerprint
from keye_train.data.indexing import build_index
from keye_train.data.mixture import Mixture
from keye_train.data.packing import Budget
from keye_train.data.plan import AT_THE_END, GlobalBatch, Plan, PlanState
from keye_train.settings import (
    CurriculumPoint,
    CurriculumSettings,
    MixtureUnit,
    ResolutionSettings,
    SettingsError,
    SourceSettings,
)
from keye_train.settings.data import check_data


class Numbers(Source):
    """A source that exists as numbers only, with a filter by row."""

    def __init__(self, name: str, rows: int, max_epochs: int | None = None, keep_every: int = 1) -> None:
        tokens = np.random.default_rng(rows).integers(1, 60, rows)
        header = ShardHeader(f"{name}.tar", rows, 1, name, "")
        super().__init__(name, (header,), np.array([0, rows]), Sizes(tokens, tokens**2, tokens, tokens**2), {})
        self.max_epochs, self._every = max_epochs, keep_every
        self.filter = None if keep_every == 1 else f"row % {keep_every} == 0"

    def look(self, rows: np.ndarray) -> Looked:
        looked = super().look(rows)
        return Looked(looked.sizes, rows % self._every == 0, looked.errors)


def tokens_of(looked: Looked) -> np.ndarray:
    return looked.sizes.tokens


def toy_plan(sources: list[Source], weights: dict[str, float], unit: MixtureUnit, window: int, packs: int = 2) -> Plan:
    corpus = Corpus({source.name: source for source in sources}, ResolutionSettings())
    rules = DrawRules(unit, block_rows=8, group_blocks=4)
    return Plan(corpus, weights, Budget(128, 300), packs, window, 0, PackCost(1e4, 0.0, 0.0, 0.0), rules)


def samples_of(batch: GlobalBatch) -> list[tuple[int, int]]:
    read = [(sample.source, sample.row) for pack in batch.packs for sample in pack.samples]
    return read + [(sample.source, sample.row) for sample in batch.dropped]


@given(st.integers(1, 400), st.integers(1, 20), st.integers(1, 8), st.integers(0, 2**40), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_an_epoch_of_blocks_is_a_permutation(size: int, block: int, group: int, seed: int, epoch: int) -> None:
    rows = row_order(size, seed, "source", block, group).rows(epoch * size + np.arange(size))
    assert sorted(rows.tolist()) == list(range(size))


def test_any_position_of_the_blocks_is_found_alone() -> None:
    order = BlockShuffle(1003, 0, "a", 16, 8)
    whole = order.rows(np.arange(5000))
    assert [int(order.rows(np.array([place]))[0]) for place in range(0, 5000, 7)] == whole[::7].tolist()
    assert (whole[:1003] == whole[1003:2006]).sum() < 20  # epochs have orders of their own


def test_a_window_of_a_huge_source_touches_few_blocks_and_mixes_them() -> None:
    order = BlockShuffle(10**9 + 17, 0, "huge", 1024, 256)
    rows = order.rows(7 * 10**8 + np.arange(20_000))
    blocks, counts = np.unique(rows // 1024, return_counts=True)
    assert len(blocks) <= 2 * 257
    assert len(blocks) >= 250
    assert counts.max() < 20_000 / 256 * 2  # none of them dominates
    together = (np.diff(rows // 1024) == 0).mean()
    assert together < 3 / 256  # neighbours of the order are from one block as rarely as by chance
    assert len(np.unique(blocks * 1024 // 10**7)) > 80  # of 100 parts of the source


@pytest.mark.parametrize("shards", [500, 9000])
def test_windows_are_about_as_alike_as_those_of_a_full_shuffle(shards: int) -> None:
    """By the default rules, where lengths depend on the shard as much as on the sample."""
    rules, size, share = DrawRules(), 450_000_000, 30_000
    order = row_order(size, 0, "huge", rules.block_rows, rules.group_blocks)
    rng = np.random.default_rng(0)
    of_shard = rng.normal(size=shards)
    of_shard -= of_shard.mean()
    strays = []
    for window in range(40):
        rows = order.rows(window * (size // 40) + np.arange(share))
        strays.append((of_shard[rows // (size // shards)] + rng.normal(size=share)).mean())
    assert np.sqrt(np.mean(np.square(strays)) / (2 / share)) < 1.5


def test_the_short_block_of_a_source_comes_anywhere_in_the_epoch() -> None:
    order = BlockShuffle(1001, 0, "a", 50, 2)
    places = [int(np.flatnonzero(order.rows(epoch * 1001 + np.arange(1001)) == 1000)[0]) for epoch in range(60)]
    assert min(places) < 200
    assert max(places) > 800


SOURCES = st.lists(
    st.tuples(st.integers(1, 90), st.one_of(st.none(), st.integers(1, 3)), st.sampled_from([1, 2, 5])),
    min_size=1,
    max_size=3,
)


@given(SOURCES, st.booleans(), st.lists(st.integers(1, 120), min_size=1, max_size=5))
@settings(max_examples=80, deadline=None)
def test_every_epoch_holds_every_row_that_passes_once(
    shapes: list[tuple[int, int | None, int]], sized: bool, cuts: list[int]
) -> None:
    """Drawn in pieces of any sizes; the same in one piece; sources with a last epoch give exactly their epochs."""
    sources = [Numbers(f"s{number}", *shape) for number, shape in enumerate(shapes)]
    mixture = Mixture({source.name: number + 1 for number, source in enumerate(sources)}, sized)
    draw = Draw(sources, mixture, DrawRules(block_rows=8, group_blocks=4), 3, tokens_of)
    state, seen, out = draw.start(), [], np.zeros(len(sources), dtype=int)
    for cut in cuts:
        drawn = draw.next(state, cut)
        seen += list(zip(drawn.sources.tolist(), drawn.rows.tolist(), strict=True))
        state, out = drawn.state, out + drawn.filtered
    whole = draw.next(draw.start(), sum(cuts))
    assert seen == list(zip(whole.sources.tolist(), whole.rows.tolist(), strict=True))
    assert (state, out.tolist()) == (whole.state, list(whole.filtered))
    for number, (source, (size, epochs, every)) in enumerate(zip(sources, shapes, strict=True)):
        rows = [row for own, row in seen if own == number]
        passing = -(-size // every)
        assert len(rows) + out[number] == state.passed[number]
        if epochs is not None:
            assert len(rows) <= epochs * passing
        for epoch in range(len(rows) // passing):
            assert sorted(rows[epoch * passing : (epoch + 1) * passing]) == list(range(0, len(source), every))
    if all(epochs is not None for _, epochs, _ in shapes):
        total = sum((epochs or 0) * -(-size // every) for size, epochs, every in shapes)
        assert len(seen) == min(total, sum(cuts))


@pytest.mark.parametrize("unit", list(MixtureUnit))
def test_resume_equals_uninterrupted_with_filters_epochs_and_units(unit: MixtureUnit) -> None:
    def plan() -> Plan:
        sources = [Numbers("a", 900, 2), Numbers("b", 500, 1, keep_every=3), Numbers("c", 700, keep_every=2)]
        return toy_plan(sources, {"a": 0.5, "b": 0.3, "c": 0.2}, unit, window=128)

    whole = list(islice(plan().batches(), 400))
    assert whole[-1][1].origin > 0  # two sources have left
    for stop in (1, 90, 200, 317):
        kept = PlanState.from_json(json.loads(json.dumps(whole[stop - 1][1].to_json())))
        assert list(islice(plan().batches(kept), 20)) == whole[stop : stop + 20]


@pytest.mark.parametrize("unit", list(MixtureUnit))
@pytest.mark.parametrize("window", [40, 1000])
def test_data_with_a_last_epoch_end_and_account_for_every_sample(unit: MixtureUnit, window: int) -> None:
    sources = [Numbers("a", 300, 2), Numbers("b", 150, 1, keep_every=3)]
    batches = list(toy_plan(sources, {"a": 0.5, "b": 0.5}, unit, window).batches())
    seen = Counter(sample for batch, _ in batches for sample in samples_of(batch))
    assert seen == {(0, row): 2 for row in range(300)} | {(1, row): 1 for row in range(0, 150, 3)}
    late = [sample for batch, _ in batches[:-1] for sample in batch.dropped]
    assert not late  # only what is left over at the very end
    assert {sample.reason for sample in batches[-1][0].dropped} <= {AT_THE_END}
    state = batches[-1][1]
    assert (state.filtered, list(toy_plan(sources, {"a": 0.5, "b": 0.5}, unit, window).batches(state))) == (
        (0, 100),
        [],
    )
    with pytest.raises(ValueError, match=r"before stage\.global_batch_packs=500 packs are full"):
        list(toy_plan(sources, {"a": 1.0}, unit, window, packs=500).batches())


def test_shares_of_tokens_are_shares_of_what_is_trained_on() -> None:
    """Two sources of unlike lengths: by samples the long one has most of the tokens, by tokens half of them."""
    shares = {}
    for unit in (MixtureUnit.samples, MixtureUnit.tokens):
        short, long = Numbers("short", 4000), Numbers("long", 4000)
        short._sizes = short.sizes.map(lambda column: column // 8 + 1)
        plan = toy_plan([short, long], {"short": 0.5, "long": 0.5}, unit, window=500)
        tokens: Counter[int] = Counter()
        for batch, _ in islice(plan.batches(), 200):
            for pack in batch.packs:
                for sample in pack.samples:
                    tokens[sample.source] += sample.tokens
        shares[unit] = tokens[0] / tokens.total()  # source 0 is "long"
    assert shares[MixtureUnit.samples] > 0.8
    assert abs(shares[MixtureUnit.tokens] - 0.5) < 0.01


def test_a_filter_that_keeps_nothing_is_refused_by_name() -> None:
    source = Numbers("a", 40)
    sizes = source.sizes
    source.look = lambda rows: Looked(sizes.take(rows), np.zeros(len(rows), dtype=bool), {})  # type: ignore
    with pytest.raises(ValueError, match=r"data\.sources\.a: none of its 40 samples .* 40 are kept out by its filter"):
        toy_plan([source], {"a": 1.0}, MixtureUnit.samples, 10)


# ------------------------------------------------------------------------------------------ filters on real indexes


def open_filtered(toy_sources: dict[str, SourceSettings], tokenizer_dir: Path, text: str | None) -> Source:
    settings = SourceSettings(toy_sources["a"].shards, filter=text)
    return Corpus.open({"a": settings}, tokenizer_dir, toy_resolution()).sources["a"]


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("images == 1", lambda row: [medium["kind"] for medium in row["media"]] == ["image"]),
        ("videos == 0 and images == 0", lambda row: not row["media"]),
        ("duration >= 1 or text_tokens < 60",
         lambda row: any(m["fps"] for m in row["media"]) or row["text_tokens"] < 60),
        ("task in ['vqa', 'x'] and task != 'x'", lambda row: row["task"] == "vqa"),
        ("50 < width <= 150 and not height * 2 > width", lambda row: bool(row["media"])
         and 50 < row["media"][0]["width"] <= 150 and row["media"][0]["height"] * 2 <= row["media"][0]["width"]),
        ("tokens - text_tokens == patches / 4 and bytes > -1", lambda row: True),
    ],
)  # fmt: skip
def test_a_filter_keeps_what_it_says(toy_sources, tokenizer_dir, text, passes) -> None:  # type: ignore[no-untyped-def]
    source = open_filtered(toy_sources, tokenizer_dir, text)
    rows = [row for shard in source.shards for row in read_columns(shard, ["media", "text_tokens", "task"]).to_pylist()]
    kept = source.look(np.arange(len(source))).keep
    assert kept.tolist() == [passes(row) for row in rows]
    assert kept.any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("widht > 3", "no column widht; columns: text_tokens"),
        ("__import__('os').system('true')", "is not part of the filter language"),
        ("task.upper() == 'A'", "is not part of the filter language"),
        ("[x for x in task]", "is not part of the filter language"),
        ("width > ", "cannot be read"),
        ("width + 3", "compares what cannot be compared"),
        ("task > 3", "compares what cannot be compared"),
        ("width is 3", "compare with"),
        ("width ** 9 > 1", "is not part of the filter language"),
        ("(" * 300 + "width" + ")" * 300, "cannot be read"),
        ("1 < width " * 500, "a filter has at most"),
    ],
)
def test_a_wrong_filter_is_refused_at_the_start(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Filter(text, "data.sources.a.filter")
    assert "data.sources.a.filter" in str(caught.value)
    assert set(COLUMNS) >= {"text_tokens", "patches", "width", "height", "duration", "task"}


# ----------------------------------------------------------------------------------------- measuring block by block


@pytest.mark.parametrize("cached", [False, True])
def test_sizes_do_not_depend_on_how_they_are_read(
    toy_sources: dict[str, SourceSettings],
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cached: bool,
) -> None:
    """Blocks that cross shards, blocks that are forgotten, a cache on the disk, also a damaged one: the same sizes."""

    def opened(cache: Path | None = None) -> Source:
        return Corpus.open(toy_sources, tokenizer_dir, toy_resolution(), cache=cache).sources["a"]

    whole = opened().look(np.arange(48))
    monkeypatch.setattr(columns, "BLOCK_ROWS", 5)
    monkeypatch.setattr(columns, "KEPT_ROWS", 15)
    monkeypatch.setattr(columns, "PART_ROWS", 10)
    cache = tmp_path if cached else None
    if cached:
        monkeypatch.setattr(opening, "_account", lambda *_: None)  # indexes of an earlier version
    source = opened(cache)
    for _ in range(2):
        rows = np.random.default_rng(0).permutation(48)
        looked = source.look(rows)
        for name in ("tokens", "tokens_squared", "patches", "patches_squared"):
            np.testing.assert_array_equal(getattr(looked.sizes, name), getattr(whole.sizes, name)[rows])
        assert len(source._store) <= 3
        for file in tmp_path.glob("*/*.sizes"):
            file.write_bytes(file.read_bytes()[:50])
        source = opened(cache)
    assert bool(list(tmp_path.glob("*/*.sizes"))) == cached


def test_what_cannot_be_read_keeps_its_reason_in_the_cache(
    make_shard,  # type: ignore[no-untyped-def]
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opening, "_account", lambda *_: None)  # an index of an earlier version
    shard = make_shard(tmp_path / "a.tar", [{"txt": b"one"}, {"json": b"{"}, {"jpg": b"no", "txt": b"x"}])
    sources = {"a": SourceSettings([str(shard)], filter="text_tokens > 0")}
    for _ in range(2):
        source = Corpus.open(sources, tokenizer_dir, toy_resolution(), cache=tmp_path / "cache").sources["a"]
        looked = source.look(np.array([2, 0, 1]))
        assert sorted(looked.errors) == [0, 2]
        assert "JSON" in looked.errors[2]
        assert looked.keep.all()  # what cannot be read is for the ledger, whatever the filter
        for file in (tmp_path / "cache").glob("[0-9a-f][0-9a-f]/*.sizes"):
            file.write_bytes(file.read_bytes()[:-9])  # sizes without their reasons do not read as "nothing is wrong"


def test_kept_sizes_are_of_one_tokenizer(
    make_shard,  # type: ignore[no-untyped-def]
    tokenizer_dir: Path,
    foreign_tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same shard under two tokenizers, whose indexes differ, from one cache."""
    shard = make_shard(tmp_path / "a.tar", [{"txt": b"one<|more|>"}])
    monkeypatch.setattr(opening, "_account", lambda *_: None)  # indexes of an earlier version
    counts = []
    for folder in (tokenizer_dir, foreign_tokenizer_dir):
        build_index(shard, PreTrainedTokenizerFast.from_pretrained(folder), tokenizer_fingerprint(folder))
        sources = {"a": SourceSettings([str(shard)])}
        source = Corpus.open(sources, folder, toy_resolution(), cache=tmp_path / "cache").sources["a"]
        source.look(np.array([0]))
        counts.append(len(list((tmp_path / "cache").glob("[0-9a-f][0-9a-f]/*.sizes"))))
    assert counts == [1, 2]


@pytest.mark.parametrize("cached", [False, True])
def test_sizes_and_keys_behind_urls_are_those_of_the_files(
    toy_sources: dict[str, SourceSettings], tokenizer_dir: Path, tmp_path: Path, cached: bool
) -> None:
    here = Corpus.open(toy_sources, tokenizer_dir, toy_resolution())
    urls = {"a": SourceSettings([f"file://{pattern}" for pattern in toy_sources["a"].shards])}
    for _ in range(2):
        there = Corpus.open(urls, tokenizer_dir, toy_resolution(), cache=tmp_path if cached else None)
        source, rows = there.sources["a"], np.array([40, 3, 47])
        np.testing.assert_array_equal(source.look(rows).sizes.tokens, here.sources["a"].look(rows).sizes.tokens)
        assert source.ref(40).key == here.sources["a"].ref(40).key
        assert source.ref(40).shard.startswith("file://")


def test_excluded_samples_are_drawn_and_given_up(toy_sources: dict[str, SourceSettings], tokenizer_dir: Path) -> None:
    source = Corpus.open(toy_sources, tokenizer_dir, toy_resolution()).sources["a"]
    source.exclude({7: "quarantined (x)"})
    looked = source.look(np.array([3, 7, 9]))
    assert looked.errors == {1: "quarantined (x)"}
    assert looked.keep.all()
    assert source.errors == {7: "quarantined (x)"}


def test_kept_headers_are_for_these_shards_only(make_shard, tokenizer_dir: Path, tmp_path: Path) -> None:  # type: ignore
    def opened() -> int:
        sources = {"a": SourceSettings([str(tmp_path / "*.tar")])}
        return len(Corpus.open(sources, tokenizer_dir, toy_resolution(), cache=tmp_path / "cache").sources["a"])

    make_shard(tmp_path / "a.tar", [{"txt": b"one"}] * 2)
    assert opened() == opened() == 2
    make_shard(tmp_path / "a.tar", [{"txt": b"one"}] * 3)
    assert opened() == 3
    make_shard(tmp_path / "a.tar", [{"txt": b"another"}] * 40, index=False)
    with pytest.raises(ValueError, match="has no index"):
        opened()


# ------------------------------------------------------------------------------------------------------- settings


def test_a_recipe_with_a_curriculum_reads_the_sources_of_all_its_points(
    toy_sources: dict[str, SourceSettings], tokenizer_dir: Path
) -> None:
    """From all a to all b over the stage's tokens, in a straight line: b has had an eighth half-way."""
    settings = toy_settings(toy_sources, tokenizer_dir)
    settings.stage.steps = 40
    settings.data.mixtures = {"mix": {"a": 1.0}, "end": {"b": 1.0}}
    settings.data.mixture_unit = MixtureUnit.tokens
    settings.data.curricula = {"mix": CurriculumSettings([CurriculumPoint(1.0, "end")])}
    check_data(settings.data)
    plan = Plan.from_settings(settings, PackCost(1.0, 0.0, 0.0, 0.0))
    assert plan.sources == ("a", "b")
    had: Counter[int] = Counter()
    for batch, _ in plan.batches():
        for pack in batch.packs:
            for sample in pack.samples:
                had[sample.source] += sample.tokens
        if batch.step == 39:
            break
    assert abs(had[1] / had.total() - 0.5) < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: setattr(data.sources["a"], "max_epochs", 0), r"data\.sources\.a\.max_epochs=0"),
        (
            lambda data: data.heldout.update(a=SourceSettings(["x"], max_epochs=1)),
            r"data\.heldout\.a: filter",
        ),
        (lambda data: data.curricula.update(x=CurriculumSettings([])), "names the mixture 'x'"),
        (lambda data: data.curricula.update(mix=CurriculumSettings([], over=9)), "at least one point"),
        (
            lambda data: data.curricula.update(mix=CurriculumSettings([CurriculumPoint(1.0, "mix")])),
            r"data\.curricula\.mix\.over: say how many samples",
        ),
        (lambda data: setattr(data, "shuffle_block_rows", 0), "shuffle_block_rows"),
    ],
)
def test_impossible_settings_are_refused(toy_sources, tokenizer_dir, change, message) -> None:  # type: ignore
    data = toy_settings(dict(toy_sources), tokenizer_dir).data
    data.sources = {name: SourceSettings(source.shards) for name, source in data.sources.items()}
    change(data)
    with pytest.raises(SettingsError, match=message):
        check_data(data)
