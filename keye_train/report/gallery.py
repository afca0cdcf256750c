"""Held-out samples with their pictures, the expected answer and what the models wrote."""

from __future__ import annotations

import base64
import io
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
from PIL import Image, ImageOps

from keye_train.data.formats import parse_sample
from keye_train.data.index import read_columns
from keye_train.data.reader import ShardReader
from keye_train.model.chat import media_slots
from keye_train.model.markup import Box, Point, parse_boxes, parse_points
from keye_train.model.video import upright
from keye_train.sample import MediaKind, Sample, SampleError, SampleRef

logger = logging.getLogger(__name__)

CARDS_PER_TASK = 8
LONGEST_SIDE = 384  # pixels of an embedded picture
STRIP_FRAMES = 6
STRIP_HEIGHT = 96  # pixels
MAX_DECODED_FRAMES = 900


@dataclass(frozen=True)
class Picture:
    """One embedded image, or the frames of a video side by side."""

    uri: str
    width: int  # pixels
    height: int  # pixels
    video: bool = False


@dataclass(frozen=True)
class Answer:
    """What one model wrote."""

    model: str
    text: str
    score: float
    correct: bool

    @property
    def grade(self) -> str:
        """The score where it is neither 0 nor 1."""
        return "" if self.score in (0.0, 1.0) else f"{self.score:.2f}"


@dataclass(frozen=True)
class Card:
    """One sample of the gallery."""

    task: str
    key: str
    question: str
    expected: str
    final: Answer
    others: Sequence[Answer]  # of the other models, in the order of the table
    pictures: Sequence[Picture]
    missing: str  # why there is no picture, where there should be one
    expected_boxes: Sequence[Box]
    found_boxes: Sequence[Box]
    found_points: Sequence[Point]


def final_model(models: Sequence[Mapping[str, Any]]) -> str:
    """Name of the model whose answers the gallery shows: the last of the table that answered questions."""
    return next((str(model["name"]) for model in reversed(models) if model.get("samples")), "")


def build_gallery(models: Sequence[Mapping[str, Any]], cards_per_task: int = CARDS_PER_TASK) -> dict[str, list[Card]]:
    """Task -> cards: the first samples of each task in the order in which they were drawn, right and wrong alike."""
    name = final_model(models)
    answers: dict[tuple[str, str, str], list[Answer]] = defaultdict(list)
    for model in models:
        for sample in model.get("samples") or []:
            answers[_identity(sample)].append(
                Answer(str(model["name"]), sample["generated"], float(sample["score"]), bool(sample["correct"]))
            )
    chosen: Sequence[Mapping[str, Any]] = next((model["samples"] for model in models if model["name"] == name), [])
    gallery: dict[str, list[Card]] = defaultdict(list)
    reader = ShardReader()
    try:
        for sample in chosen:
            if len(gallery[sample["task"]]) < cards_per_task:
                gallery[sample["task"]].append(_card(sample, name, answers[_identity(sample)], reader))
    finally:
        reader.close()
    return dict(gallery)


def _identity(sample: Mapping[str, Any]) -> tuple[str, str, str]:
    return sample["task"], sample["shard"], sample["key"]


def _card(sample: Mapping[str, Any], final: str, answers: Sequence[Answer], reader: ShardReader) -> Card:
    pictures: list[Picture] = []
    missing = ""
    boxes = parse_boxes(sample["expected"])
    try:
        record = _read(sample["shard"], sample["key"], reader)
        pictures = list(_pictures(record))
        if sample["metric"] == "point":
            corners = [float(corner) for corner in record.meta["box"]]
            boxes = [(corners[0], corners[1], corners[2], corners[3])]
    except (SampleError, FileNotFoundError) as error:
        missing = f"picture not available: {error}"
        logger.warning("gallery: %s of %s: %s", sample["key"], sample["shard"], error)
    answer = next(answer for answer in answers if answer.model == final)
    one_image = len(pictures) == 1 and not pictures[0].video
    return Card(
        task=sample["task"],
        key=sample["key"],
        question=_question(sample["question"], len(pictures)),
        expected=sample["expected"],
        final=answer,
        others=[other for other in answers if other.model != final],
        pictures=pictures,
        missing=missing,
        expected_boxes=boxes if one_image else [],
        found_boxes=parse_boxes(answer.text) if one_image else [],
        found_points=parse_points(answer.text) if one_image else [],
    )


def _question(text: str, pictures: int) -> str:
    """The place of a single picture needs no mark."""
    return text.removeprefix("[image] ").removeprefix("[video] ") if pictures == 1 else text


def _read(shard: str, key: str, reader: ShardReader) -> Sample:
    if not Path(shard).exists():
        raise FileNotFoundError(f"the shard {shard} is not here any more")
    keys = read_columns(shard, ["key"])["key"].to_pylist()
    if key not in keys:
        raise SampleError(f"the shard {shard} has no sample {key} any more")
    _, members = reader.read(shard, keys.index(key))
    return parse_sample(SampleRef("heldout", shard, key), members)


def _pictures(sample: Sample) -> Iterator[Picture]:
    for slot in media_slots(sample.messages):
        data = sample.media[slot.name]
        yield image_picture(data) if slot.kind == MediaKind.image else video_picture(data)


def image_picture(data: bytes) -> Picture:
    """An image as a JPEG of at most LONGEST_SIDE pixels a side, upright.

    Raises:
        SampleError: it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise SampleError(f"image cannot be decoded: {error}") from error
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return _embedded(image)


def video_picture(data: bytes) -> Picture:
    """Up to STRIP_FRAMES frames of a video, evenly spread, side by side.

    Raises:
        SampleError: it cannot be decoded.
    """
    frames: list[Image.Image] = []
    try:
        with av.open(io.BytesIO(data), mode="r") as container:
            for frame in container.decode(video=0):
                image = upright(frame)
                image.thumbnail((4 * STRIP_HEIGHT, STRIP_HEIGHT), Image.Resampling.BILINEAR)
                frames.append(image)
                if len(frames) == MAX_DECODED_FRAMES:
                    break
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise SampleError(f"video cannot be decoded: {error}") from error
    if not frames:
        raise SampleError("video holds no frame")
    count = min(STRIP_FRAMES, len(frames))
    chosen = [frames[round(i * (len(frames) - 1) / max(1, count - 1))] for i in range(count)]
    strip = Image.new("RGB", (sum(f.width for f in chosen) + 2 * (count - 1), max(f.height for f in chosen)))
    left = 0
    for image in chosen:
        strip.paste(image, (left, 0))
        left += image.width + 2
    return _embedded(strip, video=True)


def _embedded(image: Image.Image, video: bool = False) -> Picture:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85, optimize=True)
    text = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/jpeg;base64,{text}", image.width, image.height, video)
