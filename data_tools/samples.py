"""Samples as the model sees them: pixels after resizing with their grids, tokens with what is learnt of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from einops import rearrange
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data_tools.text import printable
from data_tools.view_reader import GuardedReader, ReadMedium
from keye_train.data.loader import ReadTask
from keye_train.model.packed import IGNORE_INDEX
from keye_train.model.positions import PATCH_SIZE, grid_tokens
from keye_train.model.sample_encoder import WHOLE, EncodedPair, EncodedSample, SampleEncoder
from keye_train.sample import MediaKind
from keye_train.settings import TrainSettings

IMAGE_SIDE = 512  # pixels of the longest side of an embedded image; larger ones are reduced for the page
FRAME_SIDE = 224
LOSSLESS_SIDE = 256  # up to here pixels are embedded as they are
MAX_FRAMES = 12
MAX_TOKENS = 700  # shown of a sample's text, runs of pad tokens counted once


@dataclass(frozen=True)
class Frame:
    """One image, or one time step of a video."""

    uri: str  # "" where the page is full
    caption: str  # time of a frame, "" for an image


@dataclass(frozen=True)
class Picture:
    """An image or video after resizing."""

    name: str  # member of the sample
    kind: str
    size: tuple[int, int]  # pixels, width and height
    grid: tuple[int, int, int]  # patches
    tokens: int
    frames: list[Frame]
    frames_left_out: int
    patch_lines: str  # SVG path in pixels: borders of the patches within the cells of the merge
    merge_lines: str  # SVG path in pixels: borders of the 2 x 2 cells, one token each


@dataclass(frozen=True)
class Piece:
    """Some tokens of the text."""

    text: str
    count: int  # tokens
    style: str  # "learnt", "read", "special learnt" or "special read"


@dataclass
class Card:
    """One sample."""

    source: str
    colour: int  # number of the source
    shard: str
    key: str
    task: str = ""
    problem: str = ""  # why it is not trained on
    change: str = ""  # what data.overlong does to it
    tokens: int = 0
    patches: int = 0
    learnt: int = 0  # tokens with a label
    pictures: list[Picture] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    tokens_left_out: int = 0


class Album:
    """Makes cards of samples, and keeps the pictures of a page below a number of bytes."""

    def __init__(self, settings: TrainSettings, encoder: SampleEncoder, reader: GuardedReader, max_bytes: int) -> None:
        self._settings, self._encoder, self._reader = settings, encoder, reader
        self._left_bytes = max_bytes
        self.full = False  # pictures were left out

    def card(self, task: ReadTask, colour: int, problem: str = "") -> Card:
        """The card of one sample; what is wrong with it stands on it, too.

        Args:
            task: which sample.
            colour: number of its source.
            problem: why the plan leaves it out.
        """
        read = self._reader.sample(task)
        card = Card(task.source, colour, task.shard, printable(read.key) or f"row {task.row}", printable(read.task))
        card.problem = printable(problem or read.problem)
        card.change = "" if task.fit == WHOLE else str(task.fit)
        if read.encoded is not None:
            self._describe(read.encoded, read.media, card)
        return card

    def _describe(self, encoded: EncodedSample | EncodedPair, media: Sequence[ReadMedium], card: Card) -> None:
        if isinstance(encoded, EncodedPair):
            ids, tokenizer = encoded.text_ids, self._encoder.text_tokenizer
            # The towers are compared; tokens are predicted by the caption decoder alone, where there is one.
            predicted = encoded.caption_tokens if self._settings.stage.caption_weight > 0 else 0
            learnt = np.arange(len(ids)) < predicted
        else:
            ids, tokenizer = encoded.input_ids, self._encoder.tokenizer
            learnt = (encoded.labels != IGNORE_INDEX).numpy()
        card.tokens, card.patches, card.learnt = len(ids), len(encoded.pixel_patches), int(learnt.sum())
        card.pieces, card.tokens_left_out = token_pieces(ids, learnt, tokenizer)
        start = 0
        for medium, grid in zip(media, encoded.grid_thw.tolist(), strict=True):
            stop = start + int(np.prod(grid))
            frames = frames_of(encoded.pixel_patches[start:stop], grid)
            card.pictures.append(self._picture(medium.name, medium.kind, frames, medium.times_s))
            start = stop

    def _picture(self, name: str, kind: MediaKind, frames: np.ndarray, times: Sequence[float]) -> Picture:
        t, height, width, _ = frames.shape
        grid = (t, height // PATCH_SIZE, width // PATCH_SIZE)
        shown = np.unique(np.linspace(0, t - 1, min(t, MAX_FRAMES)).round().astype(int)).tolist()
        side = IMAGE_SIDE if kind == MediaKind.image else FRAME_SIDE
        embedded = [Frame(self._embed(frames[k], side), f"{times[k]:.2f} s" if times else "") for k in shown]
        return Picture(
            name=printable(name),
            kind=kind.value,
            size=(width, height),
            grid=grid,
            tokens=grid_tokens(grid),
            frames=embedded,
            frames_left_out=t - len(shown),
            patch_lines=_lines(width, height, PATCH_SIZE, PATCH_SIZE),
            merge_lines=_lines(width, height, 2 * PATCH_SIZE, 0),
        )

    def _embed(self, pixels: np.ndarray, side: int) -> str:
        image = Image.fromarray(pixels)
        lossless = max(image.size) <= LOSSLESS_SIDE
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", lossless=lossless and max(image.size) == max(pixels.shape[:2]), quality=80)
        uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        if len(uri) > self._left_bytes:
            self.full = True
            return ""
        self._left_bytes -= len(uri)
        return uri


def frames_of(patches: Tensor, grid: Sequence[int]) -> np.ndarray:
    """Patches [t * h * w, 3, 14, 14] uint8 back to frames [t, 14 * h, 14 * w, 3]: the inverse of ``to_patches``."""
    t, h, w = grid
    return rearrange(patches.numpy(), "(t h w) c y x -> t (h y) (w x) c", t=t, h=h, w=w)


def _lines(width: int, height: int, step: int, first: int) -> str:
    """Lines every ``step`` pixels; with ``first`` > 0 only every second one, from there on."""
    stride = 2 * step if first else step
    rows = "".join(f"M0 {y}H{width}" for y in range(first or step, height, stride))
    return rows + "".join(f"M{x} 0V{height}" for x in range(first or step, width, stride))


def token_pieces(ids: Tensor, learnt: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Piece], int]:
    """Tokens as readable pieces, one for each token; a run of the same special token is one piece with its number, and
    tokens that share a character are one.

    Args:
        ids: [L] int64.
        learnt: [L] bool, tokens that have a label.
        tokenizer: of the ids.

    Returns:
        At most ``MAX_TOKENS`` pieces, and how many tokens are not among them.
    """
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces: list[Piece] = []
    shown = 0
    for group, is_learnt, is_special in _groups(ids.tolist(), learnt.tolist(), special, tokenizer):
        if len(pieces) == MAX_TOKENS:
            break
        text = _decode(tokenizer, group[:1] if is_special else group)
        style = ("special " if is_special else "") + ("learnt" if is_learnt else "read")
        pieces.append(Piece(printable(text), len(group), style))
        shown += len(group)
    return pieces, len(ids) - shown


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def _groups(
    ids: list[int], learnt: list[bool], special: set[int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], bool, bool]]:
    place = 0
    while place < len(ids):
        first, stop = ids[place], place + 1
        if first in special:
            while stop < len(ids) and ids[stop] == first and learnt[stop] == learnt[place]:
                stop += 1
        else:  # a character of several bytes may lie in up to four tokens
            while (
                stop < min(len(ids), place + 4)
                and ids[stop] not in special
                and learnt[stop] == learnt[place]
                and _decode(tokenizer, ids[place:stop]).endswith("\ufffd")
            ):
                stop += 1
        yield ids[place:stop], learnt[place], first in special
        place = stop
