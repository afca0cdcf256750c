"""Promises: what is written is read back; coordinates lie in [0, 1000); what a model wrote never raises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from keye_train.model import markup
from keye_train.model.chat import encode_conversation

PUBLISHED = Path(__file__).parents[3] / "shared" / "keye-vl-8b-preview"
COORDINATE = st.integers(0, markup.GRID - 1)
POINTS = st.lists(st.tuples(COORDINATE, COORDINATE), max_size=4)
QUADS = st.lists(st.tuples(*[st.tuples(COORDINATE, COORDINATE)] * 4), max_size=3)
PHRASE = st.text(max_size=12)


@st.composite
def boxes(draw: Any, least: int = 0) -> list[tuple[int, ...]]:
    def box() -> tuple[int, ...]:
        x1, y1 = draw(st.integers(0, 998)), draw(st.integers(0, 998))
        return x1, y1, draw(st.integers(x1 + 1, 999)), draw(st.integers(y1 + 1, 999))

    return [box() for _ in range(draw(st.integers(least, 4)))]


def floats(rows: Any) -> Any:
    return [tuple(floats(row) if isinstance(row[0], tuple) else map(float, row)) for row in rows]


@given(boxes(), POINTS, QUADS, PHRASE)
def test_places_survive_among_other_text(found: Any, points: Any, quads: Any, words: str) -> None:
    written = [markup.format_boxes(found), markup.format_points(points), markup.format_quads(quads)]
    text = words.join(["", *written, ""])
    assert markup.parse_boxes(text) == floats(found)
    assert markup.parse_points(text) == floats(points)
    assert markup.parse_quads(text) == [tuple(floats(quad)) for quad in quads]


@given(st.lists(st.tuples(PHRASE, boxes()), max_size=3))
def test_references_and_read_text_keep_their_own_boxes(things: list[tuple[str, Any]]) -> None:
    text = " and ".join(markup.format_reference(phrase, found) for phrase, found in things)
    expected = [markup.Reference(phrase, floats(found)) for phrase, found in things]
    assert markup.parse_references(text) == expected
    assert markup.parse_ocr(text) == []
    read = "".join(markup.format_ocr(phrase, found[0] if found else None) for phrase, found in things)
    assert markup.parse_ocr(read) == [markup.Reference(item.text, item.boxes[:1]) for item in expected]


@given(st.lists(st.tuples(st.integers(0, 99_999), st.integers(0, 9_999)), max_size=3))
def test_clips_survive_to_a_tenth_of_a_second(tenths: list[tuple[int, int]]) -> None:
    clips = [(start / 10, (start + length) / 10) for start, length in tenths]
    text = " then ".join(markup.format_clip(*clip) for clip in clips)
    assert markup.parse_clips(text) == clips


@given(st.text(max_size=20), st.text(max_size=20))
def test_thinking_survives(thought: str, answer: str) -> None:
    thought, answer = thought.strip("\n"), answer.lstrip()
    assert markup.parse_thinking(markup.format_thinking(thought, answer)) == (thought, answer)


def test_thinking_that_is_absent_empty_or_cut_off() -> None:
    assert markup.parse_thinking("plain") == (None, "plain")
    assert markup.parse_thinking("<think>\n\n</think>\n\nNothing.") == ("", "Nothing.")
    assert markup.parse_thinking("<think>\nwell, ") == ("well, ", "")


@given(st.data(), st.integers(1, 5000), st.integers(1, 5000))
def test_pixels_and_coordinates_are_one_step_apart_at_most(data: st.DataObject, width: int, height: int) -> None:
    pixels = [data.draw(st.integers(0, length)) for length in (width, height)] * 2
    coordinates = markup.to_grid(pixels, width, height)
    assert all(0 <= value < 1000 for value in coordinates)
    back = markup.to_pixels(coordinates, width, height)
    for given_pixel, found, length in zip(pixels, back, [width, height] * 2, strict=True):
        slack = length / 1000 if given_pixel > 0.9994 * length else length / 2000
        assert abs(given_pixel - found) <= slack + 1e-9
    assert markup.to_grid(markup.to_pixels(coordinates, width, height), width, height) == coordinates


@given(st.text(), st.sampled_from(["box", "point", "quad", "object_ref", "ocr_text", "clip_time"]))
def test_reading_never_raises(text: str, name: str) -> None:
    for written in (text, f"<|{name}_start|>{text}", f"<|{name}_start|>[[{text}]]<|{name}_end|>", f"<think>{text}"):
        for parse in (
            markup.parse_boxes,
            markup.parse_points,
            markup.parse_quads,
            markup.parse_references,
            markup.parse_ocr,
            markup.parse_clips,
            markup.parse_thinking,
            markup.plain_text,
        ):
            parse(written)


def test_what_cannot_be_written_is_refused() -> None:
    for wrong in ([[0, 0, 10]], [[0, 0, 10, 1000]], [[-1, 0, 10, 10]]):
        with pytest.raises(ValueError, match="4 coordinates"):
            markup.format_boxes(wrong)
    with pytest.raises(ValueError, match="four corners"):
        markup.format_quads([[(0, 0), (1, 1)]])
    with pytest.raises(ValueError, match="outside"):
        markup.to_grid([0, 101], 100, 100)
    with pytest.raises(ValueError, match=r"3 values"):
        markup.to_grid([0, 1, 2], 100, 100)
    with pytest.raises(ValueError, match="clip"):
        markup.format_clip(2.0, 1.0)
    with pytest.raises(ValueError, match="holds <"):
        markup.format_ocr("a<|ocr_text_end|>b")
    with pytest.raises(ValueError, match="</think>"):
        markup.format_thinking("</think>", "a")


def test_plain_text_has_no_marks() -> None:
    text = markup.format_thinking("hm", f"{markup.format_reference('the cat')} sleeps")
    assert markup.plain_text(text) == "the cat sleeps"


def test_the_mode_goes_to_the_last_user_text() -> None:
    image = {"type": "image", "image": "a.png"}
    messages = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": [{"type": "text", "text": "and this?"}, image]},
    ]
    before = json.dumps(messages)
    told = markup.with_thinking_mode(messages, "no_think")
    assert told[2]["content"] == [{"type": "text", "text": "and this?/no_think"}, image]
    assert told[:2] == messages[:2]
    assert json.dumps(messages) == before
    assert markup.with_thinking_mode(messages[:1], "think")[0]["content"] == "first/think"
    assert (
        markup.with_thinking_mode([{"role": "user", "content": [image]}], "think")[0]["content"][1]["text"] == "/think"
    )
    with pytest.raises(ValueError, match="modes are"):
        markup.with_thinking_mode(messages, "auto")
    with pytest.raises(ValueError, match="without a user"):
        markup.with_thinking_mode(messages[1:2], "think")


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"needs the tokenizer of Keye-VL-8B-Preview in {PUBLISHED}")
def test_every_mark_is_one_token_of_the_published_tokenizer() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(PUBLISHED, local_files_only=True)
    written = {
        markup.format_reference("x"): (151646, 151647),
        markup.format_boxes([(1, 2, 3, 4)]): (151648, 151649),
        markup.format_quads([[(0, 0), (9, 0), (9, 9), (0, 9)]]): (151650, 151651),
        markup.format_thinking("x", ""): (151667, 151668),
        markup.format_points([(1, 2)]): (151669, 151670),
        markup.format_ocr("x"): (151671, 151672),
        markup.format_clip(0, 1): (151673, 151674),
    }
    for text, ids in written.items():
        encoded = encode_conversation(tokenizer, [{"role": "assistant", "content": text}], []).input_ids.tolist()
        assert all(encoded.count(token) == 1 for token in ids), text
