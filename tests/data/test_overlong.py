"""Promise: a sample over the budgets is made to fit as the recipe says, and what is planned for it is what is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_loader import assert_same, make_loader, read_all
from toy_shards import Members, clip, picture, toy_settings

from keye_train import compose
from keye_train.data.overlong import Fitting, fit_sample
from keye_train.data.packing import Budget
from keye_train.model.chat import first_answers, media_slots, parse_turns, text_sizes
from keye_train.model.images import probe_image
from keye_train.model.media_options import MediaRequest
from keye_train.model.sample_encoder import WHOLE, SampleEncoder
from keye_train.model.video import probe_video
from keye_train.sample import Fit, Sample, SampleRef
from keye_train.settings import Objective, Overlong, ResolutionSettings, SettingsError, SourceSettings, TrainSettings

MakeShard = Callable[..., Path]
DOWN, CUT = Overlong.downscale, Overlong.truncate
WAYS = [(DOWN,), (CUT,), (DOWN, CUT), (CUT, DOWN)]
SIDES = [(30, 30), (200, 20), (500, 300), (90, 400), (280, 280)]
IMAGES = {f"{n}.jpg": picture(*sides, seed=n) for n, sides in enumerate(SIDES)}
CLIPS = {"5.mp4": clip(64, 48, 30), "6.mp4": clip(320, 180, 12)}
MEDIA = IMAGES | CLIPS
INFOS = {name: (probe_image if name in IMAGES else probe_video)(data) for name, data in MEDIA.items()}
RESOLUTION = ResolutionSettings(
    image_min_tokens=2,
    image_max_tokens=150,
    video_frame_min_tokens=3,
    video_frame_max_tokens=40,
    video_max_tokens=200,
    video_min_frames=2,
)


def part(name: str) -> dict[str, str]:
    kind = "image" if name in IMAGES else "video"
    return {"type": kind, kind: name}


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, object]]:
    messages: list[dict[str, object]] = []
    for _ in range(draw(st.integers(1, 4))):
        asked: list[dict[str, str]] = [part(name) for name in draw(st.lists(st.sampled_from([*MEDIA]), max_size=3))]
        asked.append({"type": "text", "text": "q" * draw(st.integers(1, 60))})
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": "a" * draw(st.integers(0, 80))})
    return messages[: len(messages) - draw(st.integers(0, 1))] if len(messages) > 2 else messages


@pytest.fixture(scope="module")
def encoder(tokenizer_dir: Path) -> SampleEncoder:
    toy = toy_settings({}, tokenizer_dir)
    return SampleEncoder.from_settings(toy.model, RESOLUTION)


@settings(max_examples=40, deadline=None)
@given(
    messages=conversations(),
    max_tokens=st.integers(40, 900),
    max_patches=st.integers(8, 2500),
    ways=st.sampled_from(WAYS),
    least=st.sampled_from([0.01, 0.25, 1.0]),
)
def test_what_is_planned_is_what_is_read(
    messages: list, max_tokens: int, max_patches: int, ways: tuple, least: float, encoder: SampleEncoder
) -> None:
    names = [slot.name for slot in media_slots(messages)]
    infos = [INFOS[name] for name in names]
    (size,) = text_sizes(encoder.tokenizer, [parse_turns(messages)])
    budget = Budget(max_tokens, max_patches)
    found = fit_sample(size.tokens, size.cuts, infos, RESOLUTION, Fitting(ways, budget, least))
    whole = [MediaRequest.of(info, RESOLUTION).tokens for info in infos]
    ends = [(size.tokens, len(infos)), *size.cuts] if CUT in ways else [(size.tokens, len(infos))]
    fitting = [max(t + sum(whole[:m]) - max_tokens, 4 * sum(whole[:m]) - max_patches) <= 0 for t, m in ends]
    if found is None:
        assert not any(fitting)
        if DOWN in ways and least < 0.1:  # not even the smallest sizes have room
            low = [min(t, 2 if name in IMAGES else 6) for t, name in zip(whole, names, strict=True)]
            slack = [max(1, round(0.01 * max(whole, default=0)), max(low, default=0)) * m for _, m in ends]
            assert all(
                t + need > max_tokens or 4 * need > max_patches for (t, _), need in zip(ends, slack, strict=True)
            )
        return
    # In the sample as the reader gets it.
    sample = Sample(SampleRef("a", "s", "k"), messages, {name: MEDIA[name] for name in names})
    encoded = encoder.encode(sample, found.fit)
    assert (len(encoded.input_ids), len(encoded.pixel_patches)) == (found.tokens, found.patches)
    squares = encoded.grid_thw.prod(dim=1).square().sum()
    assert found.patches_squared == int(squares)
    assert found.tokens <= max_tokens
    assert found.patches <= max_patches
    kept = first_answers(messages, found.fit.answers)
    assert kept == messages[: len(kept)]
    assert found.fit.answers == 0 or kept[-1]["role"] == "assistant"
    # Nothing more is changed than the policy asks for.
    if fitting[0]:
        assert found.fit == WHOLE
    if CUT not in ways:
        assert found.fit.answers == 0
    if DOWN not in ways or (ways[0] == CUT and any(fitting)):
        assert found.fit.media_tokens == 0
        longest = next(place for place in [0, *range(len(ends) - 1, 0, -1)] if fitting[place])
        assert found.fit.answers == longest
    limit = found.fit.media_tokens
    for before, info, grid in zip(whole, infos, encoded.grid_thw.tolist(), strict=False):
        if limit:
            assert np.prod(grid) // 4 <= max(limit, 1)
            assert limit >= least * before
        rows, columns = grid[1] // 2, grid[2] // 2
        # The aspect ratio to within the rounding of whole rows and columns.
        assert (rows - 1) / (columns + 1) <= info.height / info.width <= (rows + 1) / max(columns - 1, 0.01)


def long_source(folder: Path, make_shard: MakeShard, **policy: object) -> dict[str, SourceSettings]:
    samples: list[Members] = []
    for number in range(24):
        turns: list[dict[str, object]] = []
        for turn in range(1 + number % 3):
            turns.append({"role": "user", "content": [part(f"{number % 5}.jpg" if turn else "2.jpg")]})
            turns[-1]["content"].append({"type": "text", "text": "what? " * (4 + number)})  # type: ignore[attr-defined]
            turns.append({"role": "assistant", "content": "this " * (10 + 3 * number)})
        record = json.dumps({"messages": turns}).encode()
        samples.append({f"{n}.jpg": IMAGES[f"{n}.jpg"] for n in range(5)} | {"json": record})
    return {"a": SourceSettings([str(make_shard(folder / "long.tar", samples))], **policy)}  # type: ignore[arg-type]


@pytest.mark.parametrize("ways", WAYS)
def test_readers_carry_out_what_the_plan_decided(
    ways: tuple[Overlong, ...], tmp_path: Path, make_shard: MakeShard, tokenizer_dir: Path
) -> None:
    """The reader stops the run where a size differs from the plan's."""
    sources = long_source(tmp_path, make_shard)
    skipping = toy_settings(sources, tokenizer_dir, steps=8, resolution=RESOLUTION)
    fitting = toy_settings(sources, tokenizer_dir, steps=8, resolution=RESOLUTION, overlong=list(ways))
    before, after = read_all(skipping), read_all(fitting)
    assert sum(pack.changed for step in before for pack in step.packs) == 0
    assert sum(pack.changed for step in after for pack in step.packs) > 5
    kept = [len({ref.key for step in steps for pack in step.packs for ref in pack.refs}) for steps in (before, after)]
    assert kept[1] > kept[0]
    if ways == WAYS[2]:
        cached = toy_settings(sources, tokenizer_dir, steps=8, resolution=RESOLUTION, overlong=list(ways))
        cached.data.plan_cache = str(tmp_path / "cache")
        for cached.data.workers in (0, 1):  # the second finds the sizes that the first has kept
            with make_loader(cached) as loader:
                assert_same(list(loader), after)


def test_pairs_pay_in_patches_only(tmp_path: Path, make_shard: MakeShard, tokenizer_dir: Path) -> None:
    """Stage 0: the image goes into no sequence, so a pair that was made fit counts the tokens of its caption alone."""
    pairs: list[Members] = [{"jpg": IMAGES[f"{n % 5}.jpg"], "txt": b"a pair"} for n in range(20)]
    sources = {"a": SourceSettings([str(make_shard(tmp_path / "pairs.tar", pairs))])}
    toy = toy_settings(
        sources,
        tokenizer_dir,
        objective=Objective.contrastive,
        resolution=RESOLUTION,
        overlong=[DOWN],
        steps=4,
        max_tokens=40,  # less than the tokens of caption and image together
        max_patches=240,
    )
    steps = read_all(toy)
    packs = [pack for step in steps for pack in step.packs]
    assert not [drop for step in steps for drop in step.dropped]
    assert sum(pack.changed for pack in packs) > 5
    assert all(pack.tokens == 16 * len(pack.refs) == round(40 * pack.fill) for pack in packs)


def test_a_source_may_have_its_own_policy(tmp_path: Path, make_shard: MakeShard, tokenizer_dir: Path) -> None:
    def changed(**arguments: object) -> int:
        run = toy_settings(sources, tokenizer_dir, steps=4, resolution=RESOLUTION, **arguments)
        return sum(pack.changed for step in read_all(run) for pack in step.packs)

    sources = long_source(tmp_path, make_shard)
    assert changed() == 0
    sources["a"].overlong = [CUT]
    assert changed() > 0
    sources["a"].overlong = []
    assert changed(overlong=[CUT]) == 0


def test_another_policy_is_another_plan(tmp_path: Path, make_shard: MakeShard, tokenizer_dir: Path) -> None:
    sources = long_source(tmp_path, make_shard)
    state = read_all(toy_settings(sources, tokenizer_dir, steps=1, resolution=RESOLUTION))[0].plan_state_after
    with pytest.raises(ValueError, match=r"data\.overlong"):
        read_all(toy_settings(sources, tokenizer_dir, resolution=RESOLUTION, overlong=[CUT]), state=state)


def test_impossible_policies_name_the_setting(tokenizer_dir: Path) -> None:
    def checked(**changes: object) -> TrainSettings:
        toy = toy_settings({"a": SourceSettings(["x.tar"])}, tokenizer_dir, **changes)
        toy.model.start.random = True
        return compose.to_settings(TrainSettings, OmegaConf.create(compose.to_yaml(toy)))

    assert checked(overlong=[DOWN, CUT]).data.overlong == [DOWN, CUT]
    with pytest.raises(SettingsError, match=r"data\.overlong.*twice"):
        checked(overlong=[CUT, CUT])
    with pytest.raises(SettingsError, match=r"data\.downscale_least"):
        checked(downscale_least=0.0)
    assert str(Fit(2, 30)) == "each image and video takes at most 30 tokens, cut off behind answer 2"
