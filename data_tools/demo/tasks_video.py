"""Questions about short clips: which way a thing moves, how its colour changes, what a real scene shows."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_tools.demo.assets import load_clip
from data_tools.demo.canvas import COLOURS, shade
from data_tools.demo.captions import CLIPS
from data_tools.demo.film import ENCODERS, encode_video
from data_tools.demo.studio import Draft, Studio, Thing

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SIZES = ((56, 56), (56, 56), (84, 56), (56, 84))
CLIP_FRAMES = 8
CLIP_FPS = 4  # eight frames are two seconds; a reader at two frames a second takes every second one


def video(studio: Studio) -> Draft:
    """One of the three kinds of clip."""
    kind = str(studio.rng.choice(["move", "colours", "scene"], p=[0.45, 0.25, 0.3]))
    question, answer, frames, made_from = {"move": _move, "colours": _colours, "scene": _scene}[kind](studio)
    encoder = studio.pick(tuple(ENCODERS))
    draft = Draft("video", [("video", "0.mp4"), question], answer, "exact", made_from={"kind": kind, **made_from})
    draft.media["0.mp4"] = encode_video(frames, CLIP_FPS, encoder)
    return draft


Take = tuple[str, str, list[Image.Image], dict[str, Any]]  # question, answer, frames, record


def _move(studio: Studio) -> Take:
    """A framed photo crop or a coloured shape crosses the picture."""
    size = studio.pick(SIZES)
    answer = studio.pick(tuple(DIRECTIONS))
    side = int(studio.rng.integers(20, 27))
    thing = studio.thing()
    patch: Image.Image | None = None
    record: dict[str, Any] = {"objects": [{"shape": thing.shape, "colour": thing.colour}]}
    if studio.chance(0.5):
        patch, region = studio.photo_crop((side, side))
        ImageDraw.Draw(patch).rectangle((0, 0, side - 1, side - 1), outline=thing.rgb, width=3)
        record = {"photos": [region]}
    paper = studio.paper([thing.rgb])
    frames, path = [], _path(studio, size, side, DIRECTIONS[answer])
    for left, top in path:
        frame = Image.new("RGB", size, paper)
        if patch is None:
            thing.draw(frame, (left, top, left + side, top + side))
        else:
            frame.paste(patch, (left, top))
        frames.append(frame)
    return "Which way does it move?", answer, frames, {**record, "path": path}


def _path(studio: Studio, size: tuple[int, int], side: int, way: tuple[int, int]) -> list[tuple[int, int]]:
    """Upper left corners of the moving thing: from one edge to the other along ``way``, anywhere across it."""
    room = (size[0] - side, size[1] - side)
    across = [int(studio.rng.integers(space + 1)) for space in room]
    path = []
    for step in np.linspace(0.0, 1.0, CLIP_FRAMES):
        along = [step if sign > 0 else 1 - step for sign in way]
        path.append(
            (
                round(along[0] * room[0]) if way[0] else across[0],
                round(along[1] * room[1]) if way[1] else across[1],
            )
        )
    return path


def _colours(studio: Studio) -> Take:
    """A shape that changes its colour once, halfway."""
    size = studio.pick(SIZES)
    before, after = (list(COLOURS)[index] for index in studio.rng.choice(len(COLOURS), 2, replace=False))
    shape = studio.thing().shape
    things = [Thing(shape, colour, shade(colour, studio.rng)) for colour in (before, after)]
    side = int(studio.rng.integers(36, 51))
    left, top = (int(studio.rng.integers(length - side + 1)) for length in size)
    paper = studio.paper([thing.rgb for thing in things])
    frames = []
    for number in range(CLIP_FRAMES):
        frame = Image.new("RGB", size, paper)
        things[number >= CLIP_FRAMES // 2].draw(frame, (left, top, left + side, top + side), outline=True)
        frames.append(frame)
    record = {"objects": [{"shape": shape, "colour": thing.colour} for thing in things]}
    return "Which colours, in order?", f"{before} then {after}", frames, record


def _scene(studio: Studio) -> Take:
    """Eight frames cut from a real video, slightly cropped."""
    card = studio.pick(CLIPS)
    first, last = (card.start, card.cut) if studio.split == "train" else (card.cut, card.stop)
    stride = int(studio.rng.integers(1, min(3, (last - first - 1) // (CLIP_FRAMES - 1)) + 1))
    start = first + int(studio.rng.integers(last - first - stride * (CLIP_FRAMES - 1)))
    numbers = [start + stride * step for step in range(CLIP_FRAMES)]
    source = load_clip(card.file)
    width, height = source[0].size
    share = float(studio.rng.uniform(0.85, 1.0))
    wide, high = round(width * share), round(height * share)
    left, top = int(studio.rng.integers(width - wide + 1)), int(studio.rng.integers(height - high + 1))
    size = (84, 56)
    frames = [
        source[number].resize(size, Image.Resampling.BILINEAR, box=(left, top, left + wide, top + high))
        for number in numbers
    ]
    return "What is in the video?", card.caption, frames, {"clip": card.file, "frames": numbers}
