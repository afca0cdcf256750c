"""The sample: a conversation with its media, and what the index knows about media before they are decoded."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple


class SampleError(Exception):
    """A sample that cannot be trained on. The run goes on without it; the reason goes to the ledger.

    Raised for what is wrong with *data* (broken media, bad JSON, too long). Faults of ours raise other errors and
    stop the run.
    """


class MediaKind(str, Enum):
    """Kinds of media."""

    image = "image"
    video = "video"


@dataclass(frozen=True)
class MediaInfo:
    """Size of one image or video, read from its header. Enough to know its tokens without decoding it."""

    kind: MediaKind
    width: int  # pixels, after EXIF rotation
    height: int  # pixels, after EXIF rotation
    frames: int = 1
    fps: float = 0.0  # frames per second; 0 for images


class Fit(NamedTuple):
    """What is taken of a sample that exceeds the budgets of a pack as a whole; see ``data.overlong``."""

    answers: int = 0  # the conversation ends behind so many assistant turns; 0: it is whole
    media_tokens: int = 0  # language tokens that each image and video takes at most; 0: what the recipe allows

    def __str__(self) -> str:
        """For people: "as it is" where nothing is changed."""
        changes = [f"each image and video takes at most {self.media_tokens} tokens"] if self.media_tokens else []
        changes += [f"cut off behind answer {self.answers}"] if self.answers else []
        return ", ".join(changes) or "as it is"


@dataclass(frozen=True)
class SampleRef:
    """Where a sample stands; names it in ledgers, logs and errors."""

    source: str  # name in data.sources
    shard: str  # path or URL of the .tar
    key: str  # WebDataset key


@dataclass
class Sample:
    """A conversation and the bytes of its media.

    ``messages`` follow the chat format: ``{"role": "user" | "assistant" | "system", "content": str | list}``, where a
    content list holds ``{"type": "text", "text": ...}``, ``{"type": "image", "image": NAME}`` and
    ``{"type": "video", "video": NAME}``. NAME is a key of ``media``: the member's name in the tar without the sample's
    key, e.g. ``0.jpg`` for the member ``000017.0.jpg``. Further keys of an item, such as ``max_pixels``, are not read:
    what media cost follows from the recipe.
    """

    ref: SampleRef
    messages: list[dict[str, Any]]
    media: dict[str, bytes] = field(default_factory=dict)
    task: str = ""  # free label for logs and scores, e.g. "ocr"
    meta: dict[str, Any] = field(default_factory=dict)  # what the shard's JSON holds besides, e.g. "answer"
