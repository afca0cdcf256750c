"""Words of the language beside text: boxes, points, quadrangles, references, OCR text, clip times, thinking.

Each has a pair of tokens of the published tokenizer (v1 3.1.3, Table 1; clip times: 1.5, Table 1)::

    <|object_ref_start|>a cat<|object_ref_end|><|box_start|>[[x1,y1,x2,y2],[...]]<|box_end|>
    <|point_start|>[[x,y]]<|point_end|>         <|quad_start|>[[[x,y],[x,y],[x,y],[x,y]]]<|quad_end|>
    <|ocr_text_start|>EXIT<|ocr_text_end|><|box_start|>...       <|clip_time_start|>[1.0, 2.5]<|clip_time_end|>
    <think>...</think>answer

Coordinates are whole numbers in [0, 1000) of the picture's width and height. Table 1 also has polygons, for which the
published tokenizer has no token; quadrangles are the closest that it has.

``format_*`` writes and raises for what cannot be written; ``parse_*`` reads what a model wrote and never raises:
what is malformed is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GRID = 1000
"""Coordinates lie in [0, GRID)."""
THINKING_MODES = ("think", "no_think")

Box = tuple[float, float, float, float]  # x1, y1, x2, y2
Point = tuple[float, float]  # x, y
Quad = tuple[Point, Point, Point, Point]  # corners, clockwise from the upper left
Clip = tuple[float, float]  # seconds

_NUMBER = r"\s*(\d{1,4}(?:\.\d{1,3})?)\s*"
_PAIR = rf"\[{_NUMBER},{_NUMBER}\]"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_POINT = re.compile(_PAIR)
_QUAD = re.compile(rf"\[\s*{_PAIR}\s*,\s*{_PAIR}\s*,\s*{_PAIR}\s*,\s*{_PAIR}\s*\]")
_CLIP = re.compile(r"\[?\s*(\d{1,6}(?:\.\d{1,6})?)\s*,\s*(\d{1,6}(?:\.\d{1,6})?)\s*\]?")
_PAIRS = ("object_ref", "box", "quad", "point", "ocr_text", "clip_time")
_MARK = re.compile(r"<\|(?:" + "|".join(_PAIRS) + r")_(?:start|end)\|>")
_THOUGHT = re.compile(r"\s*<think>(.*?)(?:</think>\s*|$)", re.DOTALL)


# ------------------------------------------------------------------------------------------------ coordinates


def to_grid(pixels: Sequence[float], width: float, height: float) -> list[int]:
    """x, y, x, y, ... in pixels -> the nearest coordinates in [0, 1000).

    Raises:
        ValueError: a place outside the picture, or an odd number of values.
    """
    lengths = _lengths(pixels, width, height)
    for value, length in zip(pixels, lengths, strict=True):
        if not 0 <= value <= length:
            raise ValueError(f"coordinate {value} is outside a picture of {width} x {height} pixels")
    return [min(GRID - 1, round(value * GRID / length)) for value, length in zip(pixels, lengths, strict=True)]


def to_pixels(coordinates: Sequence[float], width: float, height: float) -> list[float]:
    """x, y, x, y, ... in [0, 1000) -> pixels: at most half a step (length / 2000) off, at the far edge a whole one."""
    lengths = _lengths(coordinates, width, height)
    return [value * length / GRID for value, length in zip(coordinates, lengths, strict=True)]


def _lengths(values: Sequence[float], width: float, height: float) -> list[float]:
    if len(values) % 2 or width <= 0 or height <= 0:
        raise ValueError(f"{len(values)} values for a picture of {width} x {height} pixels; use x, y, x, y, ...")
    return [width, height] * (len(values) // 2)


# ---------------------------------------------------------------------------------------------------- writing


def format_boxes(boxes: Sequence[Sequence[float]]) -> str:
    """Boxes as the model writes them; coordinates are rounded to whole numbers.

    Raises:
        ValueError: a box without four coordinates in [0, 1000).
    """
    return _wrapped("box", _nested(boxes, 4))


def format_points(points: Sequence[Sequence[float]]) -> str:
    """Points as the model writes them; errors as for ``format_boxes``."""
    return _wrapped("point", _nested(points, 2))


def format_quads(quads: Sequence[Sequence[Sequence[float]]]) -> str:
    """Quadrangles, corners clockwise; errors as for ``format_boxes``."""
    if any(len(quad) != 4 for quad in quads):
        raise ValueError("a quadrangle has four corners")
    return _wrapped("quad", "[" + ",".join(_nested(quad, 2) for quad in quads) + "]")


def format_reference(phrase: str, boxes: Sequence[Sequence[float]] = ()) -> str:
    """A phrase that means things in the picture, and where they are if ``boxes`` are given.

    Raises:
        ValueError: the phrase holds a token of these; or see ``format_boxes``.
    """
    return _wrapped("object_ref", _plain(phrase)) + (format_boxes(boxes) if boxes else "")


def format_ocr(text: str, box: Sequence[float] | None = None) -> str:
    """Text that stands in the picture, and where; errors as for ``format_reference``."""
    return _wrapped("ocr_text", _plain(text)) + (format_boxes([box]) if box is not None else "")


def format_clip(start_s: float, end_s: float) -> str:
    """A stretch of a video in seconds, to a tenth.

    Raises:
        ValueError: it ends before it begins, or begins before the video.
    """
    if not 0 <= start_s <= end_s < 1e6:
        raise ValueError(f"clip from {start_s} s to {end_s} s")
    return _wrapped("clip_time", f"[{start_s:.1f}, {end_s:.1f}]")


def format_thinking(thought: str, answer: str) -> str:
    """An answer with what was thought before it; an empty thought is the published form of not thinking.

    Raises:
        ValueError: the thought holds <think> or </think>.
    """
    if "<think>" in thought or "</think>" in thought:
        raise ValueError("a thought cannot hold <think> or </think>")
    return f"<think>\n{thought}\n</think>\n\n{answer}"


def with_thinking_mode(messages: Sequence[Mapping[str, Any]], mode: str) -> list[dict[str, Any]]:
    """Append "/think" or "/no_think" to the last user text: how Keye is told to think or not; without, it decides.

    Args:
        messages: a conversation; it is not changed.
        mode: "think" or "no_think".

    Raises:
        ValueError: another mode, or no user message.
    """
    if mode not in THINKING_MODES:
        raise ValueError(f"thinking mode {mode!r}; modes are {', '.join(THINKING_MODES)}")
    told = [dict(message) for message in messages]
    for message in reversed(told):
        if message.get("role") != "user":
            continue
        content = message["content"]
        if isinstance(content, str):
            message["content"] = f"{content}/{mode}"
            return told
        items = [dict(item) for item in content]
        texts = [item for item in items if "text" in item]
        if texts:
            texts[-1]["text"] += f"/{mode}"
        else:
            items.append({"type": "text", "text": f"/{mode}"})
        message["content"] = items
        return told
    raise ValueError("conversation without a user message")


# ---------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Reference:
    """A phrase or a piece of text and the boxes that follow it."""

    text: str
    boxes: list[Box]


def parse_boxes(text: str) -> list[Box]:
    """Boxes between ``<|box_start|>`` and ``<|box_end|>`` (or the end); those without an area are left out."""
    boxes = []
    for span in _spans("box", text):
        for found in _BOX.findall(span):
            x1, y1, x2, y2 = (float(number) for number in found)
            if x1 < x2 and y1 < y2:
                boxes.append((x1, y1, x2, y2))
    return boxes


def parse_points(text: str) -> list[Point]:
    """Points between ``<|point_start|>`` and ``<|point_end|>`` (or the end)."""
    return [(float(x), float(y)) for span in _spans("point", text) for x, y in _POINT.findall(span)]


def parse_quads(text: str) -> list[Quad]:
    """Quadrangles between ``<|quad_start|>`` and ``<|quad_end|>`` (or the end)."""
    quads: list[Quad] = []
    for span in _spans("quad", text):
        for found in _QUAD.findall(span):
            x1, y1, x2, y2, x3, y3, x4, y4 = (float(number) for number in found)
            quads.append(((x1, y1), (x2, y2), (x3, y3), (x4, y4)))
    return quads


def parse_references(text: str) -> list[Reference]:
    """Phrases between ``<|object_ref_start|>`` and ``<|object_ref_end|>`` with the boxes right behind each."""
    return _with_boxes("object_ref", text)


def parse_ocr(text: str) -> list[Reference]:
    """Texts between ``<|ocr_text_start|>`` and ``<|ocr_text_end|>`` with the boxes right behind each."""
    return _with_boxes("ocr_text", text)


def parse_clips(text: str) -> list[Clip]:
    """Stretches of a video between ``<|clip_time_start|>`` and ``<|clip_time_end|>`` (or the end)."""
    found = (_CLIP.fullmatch(span.strip()) for span in _spans("clip_time", text))
    clips = ((float(match[1]), float(match[2])) for match in found if match)
    return [(start, end) for start, end in clips if start <= end]


def parse_thinking(text: str) -> tuple[str | None, str]:
    """What was thought (None: nothing was opened) and the answer; a thought that is cut off leaves an empty answer."""
    match = _THOUGHT.match(text)
    return (None, text) if match is None else (match[1].strip("\n"), text[match.end() :])


def plain_text(text: str) -> str:
    """``text`` without the tokens of this module and without its thoughts."""
    return _MARK.sub("", parse_thinking(text)[1])


def _with_boxes(name: str, text: str) -> list[Reference]:
    pattern = rf"<\|{name}_start\|>(.*?)<\|{name}_end\|>(\s*<\|box_start\|>.*?(?:<\|box_end\|>|$))?"
    return [Reference(phrase, parse_boxes(boxes)) for phrase, boxes in re.findall(pattern, text, re.DOTALL)]


def _spans(name: str, text: str) -> list[str]:
    return re.findall(rf"<\|{name}_start\|>(.*?)(?:<\|{name}_end\|>|$)", text, re.DOTALL)


def _wrapped(name: str, inner: str) -> str:
    return f"<|{name}_start|>{inner}<|{name}_end|>"


def _nested(rows: Iterable[Sequence[float]], length: int) -> str:
    written = []
    for row in rows:
        numbers = [round(value) for value in row]
        if len(numbers) != length or not all(0 <= number < GRID for number in numbers):
            raise ValueError(f"{list(row)}: {length} coordinates in [0, {GRID}) are needed")
        written.append("[" + ",".join(map(str, numbers)) + "]")
    return "[" + ",".join(written) + "]"


def _plain(text: str) -> str:
    if (found := _MARK.search(text)) is not None:
        raise ValueError(f"text that holds {found[0]}")
    return text
