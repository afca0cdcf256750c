"""The studio: the assets of one split and one random stream, and the choices that all tasks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from data_tools.demo.assets import Assets
from data_tools.demo.canvas import (
    COLOURS,
    LEAST_CONTRAST,
    PAPERS,
    RGB,
    SHAPES,
    Box,
    contrast,
    draw_shape,
    encode_image,
    shade,
)

T = TypeVar("T")
PLAIN_COLOURS = (*COLOURS.values(), (255, 255, 255), (200, 200, 205), (120, 120, 125), (225, 205, 170), (150, 200, 225))


@dataclass
class Draft:
    """One sample before it is written.

    ``metric`` says how an answer is scored: ``exact`` (equal after normalisation), ``token_f1`` (overlap of words),
    ``box_iou`` (intersection over union with the answer's box, right from 0.5), ``point`` (inside ``extra["box"]``).
    """

    task: str
    parts: list[Any]  # the user's turn in order: text, or ("image" | "video", name of the member)
    answer: str
    metric: str
    media: dict[str, bytes] = field(default_factory=dict)  # member name without the key, e.g. "0.jpg"
    made_from: dict[str, Any] = field(default_factory=dict)  # how the sample was composed, for tests and viewers
    extra: dict[str, Any] = field(default_factory=dict)  # further fields of the record, e.g. "language", "box"

    def record(self) -> dict[str, Any]:
        """The JSON member of the shard."""
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": part[0], part[0]: part[1]}
            for part in self.parts
        ]
        return {
            "messages": [
                {"role": "user", "content": content},
                {"role": "assistant", "content": self.answer},
            ],
            "task": self.task,
            "answer": self.answer,
            "metric": self.metric,
            "made_from": self.made_from,
            **self.extra,
        }


class Studio:
    """Draws from one split of the assets with one random stream."""

    def __init__(self, assets: Assets, split: str, rng: np.random.Generator) -> None:
        self.assets = assets
        self.split = split  # "train" or "heldout"
        self.rng = rng

    def pick(self, choices: Sequence[T]) -> T:
        """One of ``choices``, all alike."""
        return choices[int(self.rng.integers(len(choices)))]

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return bool(self.rng.random() < probability)

    def size(self, square: float = 0.85, longest_aspect: float = 1.7) -> tuple[int, int]:
        """Width and height of a canvas: sides mostly 56 to 112 pixels, at times up to 168."""
        short = int(self.rng.integers(56, 65))
        if self.chance(0.15):
            short = int(self.rng.integers(65, 113))
        aspect = 1.0 if self.chance(square) else float(self.rng.uniform(1.0, longest_aspect))
        long = min(168, round(short * aspect))
        return (long, short) if self.chance(0.5) else (short, long)

    def scan(self, digit: int | None = None) -> tuple[int, np.ndarray, int]:
        """One digit scan of this split: its index, its levels [8, 8] and the digit that it shows."""
        digit = int(self.rng.integers(10)) if digit is None else digit
        index = int(self.rng.choice(self.assets.scan_ids(self.split, digit)))
        return index, self.assets.scans[index], digit

    def photo_crop(
        self, size: tuple[int, int], file: str | None = None, least_share: float = 0.3
    ) -> tuple[Image.Image, dict[str, Any]]:
        """A crop of this split's part of a photograph, scaled to ``size``, and the record of its box.

        Each side of the crop is at least ``least_share`` of the part's side.
        """
        photo = self.assets.photos[file or self.pick(list(self.assets.photos))]
        x0, y0, x1, y1 = photo.region(self.split)
        wide = round((x1 - x0) * self.rng.uniform(least_share, 1.0))
        high = round((y1 - y0) * self.rng.uniform(least_share, 1.0))
        left = x0 + int(self.rng.integers(x1 - x0 - wide + 1))
        top = y0 + int(self.rng.integers(y1 - y0 - high + 1))
        box = (left, top, left + wide, top + high)
        crop = photo.image.crop(box).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
        return crop, {"photo": photo.card.file, "box": list(box)}

    def backdrop(
        self, size: tuple[int, int], avoid: Sequence[RGB], photo_share: float = 0.25, file: str | None = None
    ) -> tuple[Image.Image, dict[str, Any]]:
        """A canvas for objects of the colours ``avoid``: a plain colour far from them, or a softened photo crop."""
        if file is None and not self.chance(photo_share):
            plain = self.paper(avoid)
            return Image.new("RGB", size, plain), {"plain": list(plain)}
        crop, record = self.photo_crop(size, file)
        return Image.blend(crop, Image.new("RGB", size, (128, 128, 128)), 0.35), record

    def page(self, size: tuple[int, int], paper: str | None = None) -> tuple[Image.Image, dict[str, Any]]:
        """Light paper to write on; of any colour and at times with a photograph faintly on it, or as named."""
        plain = shade(paper or self.pick(tuple(PAPERS)), self.rng, spread=8)
        image = Image.new("RGB", size, plain)
        if paper is not None or not self.chance(0.1):
            return image, {"plain": list(plain)}
        crop, record = self.photo_crop(size)
        return Image.blend(image, crop, 0.2), record

    def paper(self, avoid: Sequence[RGB]) -> RGB:
        """A plain colour far from all of ``avoid``; the farthest there is where none is far."""
        ranked = [
            (min((contrast(colour, other) for other in avoid), default=442.0), colour) for colour in PLAIN_COLOURS
        ]
        far = [colour for distance, colour in ranked if distance >= LEAST_CONTRAST]
        return self.pick(far) if far else max(ranked)[1]

    def thing(self, colours: Sequence[str] = tuple(COLOURS), shapes: Sequence[str] = SHAPES) -> Thing:
        """A random coloured shape."""
        colour = self.pick(colours)
        return Thing(self.pick(shapes), colour, shade(colour, self.rng))

    def two_things(self) -> tuple[Thing, Thing]:
        """Two shapes that differ in colour or shape."""
        first = second = self.thing()
        while second.name == first.name:
            second = self.thing()
        return first, second

    def photograph(self, draft: Draft, image: Image.Image, grey: bool = False) -> tuple[str, str]:
        """Encode ``image`` into ``draft.media``; the part of the user's turn that shows it."""
        suffix, data = encode_image(image, self.rng, grey)
        name = f"{len(draft.media)}.{suffix}"
        draft.media[name] = data
        return "image", name


@dataclass(frozen=True)
class Thing:
    """A coloured shape."""

    shape: str
    colour: str
    rgb: RGB

    @property
    def name(self) -> str:
        """In words, e.g. ``red circle``."""
        return f"{self.colour} {self.shape}"

    def draw(self, image: Image.Image, box: Box, outline: bool = False) -> dict[str, Any]:
        """Draw it into ``box``; the record of what was drawn."""
        draw_shape(image, self.shape, self.rgb, box, outline)
        return {"shape": self.shape, "colour": self.colour, "box": list(box)}
