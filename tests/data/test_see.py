"""Promise: ``keye-data plan`` reports what the training will read, ``keye-data view`` shows what the model gets, and
nothing that stands in a shard becomes part of their pages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from nasty_encoder import NastyEncoder
from toy_shards import chat, clip, mixed_samples, picture, toy_settings

from data_tools.cli import main
from data_tools.plan_cmd import PlanOptions, describe
from data_tools.samples import Album, frames_of
from data_tools.simulation import Distribution, simulate
from data_tools.view_cmd import ViewOptions, first_planned, first_skipped
from data_tools.view_reader import GuardedReader
from keye_train import compose
from keye_train.data.cost import training_cost
from keye_train.data.loader import Loader, ReadTask
from keye_train.data.plan import GlobalBatch, Plan, PlanState, assign
from keye_train.model.images import decode_image, to_patches
from keye_train.model.sample_encoder import SampleEncoder
from keye_train.settings import SourceSettings, TrainSettings

MakeShard = Callable[..., Path]
Refused = Callable[..., str]
ATTACK = "</span></title><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\x1b[31m"
SAFE_TAGS = set(
    (  # noqa: SIM905 (a list of 44 strings is no easier to read)
        "html head meta title style body header p h1 h2 h3 dl div dt dd main section table thead tbody tr th td small "
        "figure figcaption svg line text rect path ul li span footer b i em br details summary article img sub"
    ).split()
)


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data

    def assert_harmless(self) -> None:
        """Only our own tags; no handlers, no links, no picture from elsewhere."""
        assert self.tags <= SAFE_TAGS, self.tags - SAFE_TAGS
        for name, value in self.attributes:
            assert not name.startswith("on")
            assert name not in ("href", "srcset", "action")
            assert name != "src" or value.startswith("data:image/webp;base64,")


def keye_data(*arguments: object) -> int | str | None:
    """Exit status of the command."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, make_shard: MakeShard, tokenizer_dir: Path) -> TrainSettings:
    """Two good sources, and one with samples over the budget, unreadable ones and attacks."""
    folder = tmp_path_factory.mktemp("see")
    make_shard(folder / "good.tar", mixed_samples(40))
    make_shard(folder / "more.tar", mixed_samples(24, 1))
    bad = mixed_samples(12, 2)
    bad[0] = {"txt": b"long " * 200}
    bad[1] = {"json": chat("?", "no such picture", image=ATTACK)}
    bad[2] = {"jpg": picture(50, 40), "json": json.dumps({"caption": ATTACK, "task": ATTACK}).encode()}
    bad[3] = {"jpg": picture(80, 60)[:-1500], "txt": b"cut off behind its header"}
    make_shard(folder / "bad.tar", bad)
    sources = {name: SourceSettings([str(folder / f"{name}.tar")]) for name in ("good", "more", "bad")}
    settings = toy_settings(sources, tokenizer_dir)
    settings.data.mixtures = {"mix": {"good": 0.5, "more": 0.2, "bad": 0.3}}
    return settings


@pytest.fixture(scope="module")
def recipes(toy: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipes folder whose primary recipe is the toy."""
    folder = tmp_path_factory.mktemp("recipes")
    toy.model.start.random = True
    (folder / "train.yaml").write_text("defaults: [train_schema, _self_]\n" + compose.to_yaml(toy))
    return folder


def toy_plan(settings: TrainSettings) -> Plan:
    return Plan.from_settings(settings, training_cost(settings))


# ---------------------------------------------------------------------------------------------------------- plan


def test_the_simulation_counts_what_the_ranks_will_read(toy: TrainSettings) -> None:
    plan, steps, ranks = toy_plan(toy), 9, 2
    simulated = simulate(plan, toy, ranks, lambda result: result.steps >= steps)
    figures = describe(simulated, PlanOptions(world_size=ranks))
    fills, balance, drawn, reasons = [], [], dict.fromkeys(plan.sources, 0), 0
    for (batch, _), _ in zip(plan.batches(), range(steps), strict=False):
        for micro_step in assign(batch, ranks):
            balance.append(np.mean([pack.cost for pack in micro_step]) / max(pack.cost for pack in micro_step))
            fills += [pack.tokens / toy.stage.max_tokens for pack in micro_step]
            for sample in (sample for pack in micro_step for sample in pack.samples):
                drawn[plan.sources[sample.source]] += 1
        reasons += len(batch.dropped)
    assert figures["distributions"]["token_fill"]["mean"] == pytest.approx(np.mean(fills))
    assert figures["distributions"]["balance"]["mean"] == pytest.approx(np.mean(balance))
    assert {source["name"]: source["samples"] for source in figures["sources"]} == drawn
    assert sum(row["samples"] for row in figures["left_out"]) == reasons > 0
    assert any(row["reason"] == "over budget: stage.max_tokens" for row in figures["left_out"])
    for share in ("samples", "tokens", "patches", "flops"):
        assert sum(source[f"share_{share}"] for source in figures["sources"]) == pytest.approx(1)
    good = next(source for source in figures["sources"] if source["name"] == "good")
    assert good["steps_per_epoch"] == pytest.approx(40 * steps / drawn["good"])
    for source in figures["sources"]:
        assert source["share_samples"] == pytest.approx(source["weight"], abs=0.1)
    # Twice the speed halves the step and doubles what the loader must deliver.
    faster = describe(simulated, PlanOptions(world_size=ranks, device_flops=2 * 989e12))["loader"]
    assert faster["step_s"] == pytest.approx(figures["loader"]["step_s"] / 2)
    assert faster["shard_bytes_per_s"] == pytest.approx(figures["loader"]["shard_bytes_per_s"] * 2)


def test_percentiles_and_histograms_of_a_distribution() -> None:
    values = np.random.default_rng(0).beta(5, 2, 5000)
    distribution = Distribution(0, 1, 2000)
    for part in np.array_split(values, 7):
        distribution.add(part)
    for rank in (1, 50, 99):
        assert distribution.percentile(rank) == pytest.approx(np.percentile(values, rank), abs=2e-3)
    edges, counts = distribution.histogram(40)
    assert counts.sum() == 5000
    assert len(counts) <= 41
    assert len(edges) == len(counts) + 1
    np.testing.assert_array_equal(counts, np.histogram(values, edges)[0])
    assert distribution.mean == pytest.approx(values.mean())


def test_the_command_writes_text_json_and_a_page(
    recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "plan.html"
    assert keye_data("plan", "--recipes", recipes, "world_size=2", "steps=6", f"out={page}") == 0
    shown = capsys.readouterr().out
    assert "6 steps on 2 ranks: 24 packs" in shown
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    Page(page).assert_harmless()
    assert "over budget: stage.max_tokens" in Page(page).text
    assert page.stat().st_size < 500_000
    assert keye_data("plan", "--recipes", recipes, "samples=200", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["drawn"] >= 200
    assert figures["world_size"] == 1
    most = max(figures["sources"], key=lambda row: row["epochs_in_recipe"])
    assert most["epochs_in_recipe"] > 2
    words = ("samples=200", f"data.sources.{most['name']}.max_epochs=2")
    assert keye_data("plan", "--recipes", recipes, *words, "--json") == 0
    capped = {row["name"]: row["epochs_in_recipe"] for row in json.loads(capsys.readouterr().out)["sources"]}
    assert capped[most["name"]] <= 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("world_size=3",), "does not divide over 3 ranks"),
        (("steps=2", "samples=3"), "give one of them"),
        (("mfu=40",), "mfu=40.0 is a share"),
        (("stage.max_token=5",), "Did you mean 'max_tokens'?"),
        (("steps=many",), "steps"),
        (("steps=",), "'steps=' has no value: write steps=VALUE"),
        (("out",), "'out' has no value"),
    ],
)
def test_mistakes_name_the_setting(words: tuple[str, ...], message: str, recipes: Path, refused: Refused) -> None:
    assert message in refused("plan", "--recipes", recipes, *words)


# ---------------------------------------------------------------------------------------------------------- view


def test_patches_become_the_picture_that_they_were_cut_from() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 28, 42, 3), dtype=np.uint8)
    np.testing.assert_array_equal(frames_of(torch.from_numpy(to_patches(frames)), (3, 2, 3)), frames)


def album_of(settings: TrainSettings, max_bytes: int = 10**6) -> Album:
    encoder = SampleEncoder.from_settings(settings.model, settings.data.resolution)
    return Album(settings, encoder, GuardedReader(settings, encoder), max_bytes)


def test_a_card_shows_the_tokens_that_are_learnt_and_the_true_times(
    toy: TrainSettings, tmp_path: Path, make_shard: MakeShard
) -> None:
    question = "What <|im_end|> moves? 太阳"
    shard = make_shard(
        tmp_path / "a.tar", [{"0.mp4": clip(64, 48, 16), "json": chat(question, "a 猫 🐈", video="0.mp4")}]
    )
    card = album_of(toy).card(ReadTask("a", str(shard), 0, 0, 0, 0), 3)
    assert not card.problem
    learnt = [piece for piece in card.pieces if piece.style.endswith("learnt")]
    assert "".join(piece.text for piece in learnt) == "a 猫 🐈<|im_end|>"
    assert card.learnt == sum(piece.count for piece in learnt)
    read = "".join(piece.text for piece in card.pieces if piece.style == "read")
    assert question in read  # what looks like a special token in a text is text
    (film,) = card.pictures
    pads = next(piece for piece in card.pieces if piece.text == "<|video_pad|>")
    assert pads.count == film.tokens
    assert sum(piece.count for piece in card.pieces) == card.tokens
    assert [frame.caption for frame in film.frames] == ["0.00 s", "0.62 s", "1.25 s", "1.88 s"]
    assert film.grid[0] == 4
    assert card.patches == np.prod(film.grid)


def test_the_page_shows_what_the_loader_reads(toy: TrainSettings, recipes: Path, tmp_path: Path) -> None:
    page = tmp_path / "view.html"
    assert keye_data("view", "--recipes", recipes, f"out={page}", "packs=3", "per_source=3") == 0
    seen = Page(page)
    seen.assert_harmless()
    encoder = SampleEncoder.from_settings(toy.model, toy.data.resolution)
    with Loader(toy_plan(toy), encoder, 0, 1, toy) as loader:
        packs = next(loader).packs
    borders = {str(pack.inputs.cu_seqlens.tolist()) for pack in packs}
    assert sum(f"cu_seqlens of samples {border}" in seen.text for border in borders) == 3
    chosen = first_planned(toy_plan(toy), ViewOptions(per_source=3))
    assert len(chosen) == 9
    assert {one.task.source for one in chosen} == {"good", "more", "bad"}


def test_attacks_in_texts_and_names_stay_text(toy: TrainSettings, recipes: Path, tmp_path: Path) -> None:
    page = tmp_path / "attack.html"
    assert keye_data("view", "--recipes", recipes, f"out={page}", "keys=[000000001,000000002]") == 0
    seen = Page(page)
    seen.assert_harmless()
    assert "<script>alert(1)</script>" in seen.text
    assert not {"\x1b", "\u202e"} & set(seen.text)


def test_skipped_samples_show_their_reason(recipes: Path, tmp_path: Path, refused: Refused) -> None:
    page = tmp_path / "skipped.html"
    assert keye_data("view", "--recipes", recipes, f"out={page}", "skipped=true", "scan_samples=400") == 0
    text = Page(page).text
    assert "tokens > stage.max_tokens=400" in text
    assert "messages name the image" in text
    assert "1,0" in text  # the long text is shown all the same, with its tokens
    assert "no sample with the key 'x'" in refused("view", "--recipes", recipes, f"out={page}", "keys=[x]")
    cut_off = tmp_path / "cut.html"
    assert keye_data("view", "--recipes", recipes, f"out={cut_off}", "keys=['000000003']") == 0
    assert "broken image" in Page(cut_off).text  # only reading shows this one


def test_the_search_for_skipped_samples_ends_when_each_source_has_enough(
    toy: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = dict.fromkeys(("bad", "again"), toy.data.sources["bad"])
    plan = toy_plan(replace(toy, data=replace(toy.data, sources=sources, mixtures={"mix": {"bad": 2, "again": 1}})))
    batches, looked = plan.batches, 0

    def few() -> Iterator[tuple[GlobalBatch, PlanState]]:
        nonlocal looked
        for looked, batch in enumerate(batches(), start=1):
            assert looked < 50, "the search goes on"
            yield batch

    monkeypatch.setattr(plan, "batches", few)
    chosen = first_skipped(plan, ViewOptions(per_source=2, scan_samples=10**9))
    assert sorted(one.source for one in chosen) == [0, 0, 1, 1]
    assert looked >= 1


def test_samples_made_to_fit_say_how(recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "changed.html"
    words = ("stage.max_patches=40", "data.overlong=[downscale]", "data.downscale_least=0.1")
    assert keye_data("view", "--recipes", recipes, f"out={page}", "changed=true", "per_source=2", *words) == 0
    seen = Page(page)
    seen.assert_harmless()
    assert seen.text.count("made to fit: each image and video takes at most") == 6
    capsys.readouterr()
    assert keye_data("plan", "--recipes", recipes, "steps=6", *words, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert all(source["downscaled"] > 0 and source["truncated"] == 0 for source in figures["sources"])
    assert "over budget: stage.max_patches" not in {row["reason"] for row in figures["left_out"]}


def test_a_sample_that_hangs_its_decoder_is_shown_with_that_reason(
    toy: TrainSettings, tmp_path: Path, make_shard: MakeShard
) -> None:
    shard = make_shard(tmp_path / "nasty.tar", [{"txt": b"SPIN"}, {"txt": b"fine"}])
    settings = replace(toy, data=replace(toy.data, workers=1, decode_seconds=1.0))
    encoder = NastyEncoder.from_settings(toy.model, toy.data.resolution)
    with GuardedReader(settings, encoder) as reader:
        album = Album(settings, encoder, reader, 10**6)
        spin, fine = (album.card(ReadTask("a", str(shard), row, row, 0, 0), 0) for row in range(2))
    assert "data.decode_seconds=1" in spin.problem  # of CPU time, or on a busy machine by the clock
    assert not fine.problem
    assert (spin.key, fine.key) == ("000000000", "000000001")


def test_the_page_is_bounded(recipes: Path, tmp_path: Path) -> None:
    page = tmp_path / "small.html"
    assert keye_data("view", "--recipes", recipes, f"out={page}", "max_megabytes=0.01", "packs=0") == 0
    pictures = [value for name, value in Page(page).attributes if name == "src"]
    assert sum(map(len, pictures)) <= 10_000
    assert "not on this page" in Page(page).text


def test_stage_0_shows_pairs(toy: TrainSettings, recipes: Path, tmp_path: Path, make_shard: MakeShard) -> None:
    pairs = [{"jpg": picture(60, 40, seed), "txt": b"a pair"} for seed in range(20)]
    make_shard(tmp_path / "pairs.tar", pairs)
    page = tmp_path / "pairs.html"
    words = ("stage.objective=contrastive", "stage.trainable=[vision,text_tower]", "stage.max_patches=200")
    words += (
        f"data.sources.good.shards=[{tmp_path}/pairs.tar]",
        "data.mixtures.mix.more=0.0",
        "data.mixtures.mix.bad=0.0",
    )
    assert keye_data("view", "--recipes", recipes, f"out={page}", *words) == 0
    seen = Page(page)
    seen.assert_harmless()
    assert "a pair" in seen.text.replace("\n", "")
    assert "<|endoftext|>" in seen.text
    _, grid = decode_image(pairs[0]["jpg"], toy.data.resolution)
    assert f"grid {' × '.join(map(str, grid))}" in seen.text
