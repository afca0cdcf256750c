"""Messages as users of transformers write them -> messages of ours and the media that stand in them.

In ours a medium has a name (``Sample``); here it stands in the message itself, with options of its own::

    {"role": "user", "content": [{"type": "image", "image": "cat.png", "max_pixels": 200_000},
                                 {"type": "text", "text": "what is it?"}]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keye_train.model import published_pixels
from keye_train.model.chat import Message
from keye_train.model.images import cut_image, upright_size
from keye_train.model.media import read_image, read_video
from keye_train.model.media_options import IMAGE_OPTION_NAMES, MediaOptions, MediaRequest, media_options
from keye_train.model.positions import Grid
from keye_train.model.video import decode_frames, decode_video, frames_request, probe_video
from keye_train.sample import MediaInfo, MediaKind, SampleError
from keye_train.settings import ResolutionSettings, VideoBackend

_SOURCE_KEYS = ("url", "path", "base64")


@dataclass(frozen=True)
class Pixels:
    """One image or video, cut into patches."""

    kind: MediaKind
    patches: np.ndarray  # [t * h * w, 3, 14, 14] uint8
    grid: Grid
    seconds_per_grid: float  # 0 for images


@dataclass(frozen=True)
class Medium:
    """An image or video that stands in a message."""

    kind: MediaKind
    source: Any  # see ``media.read_image`` and ``media.read_video``
    options: MediaOptions

    def request(self, resolution: ResolutionSettings, allow_http: bool = False) -> MediaRequest:
        """What it costs, from its header alone.

        Raises:
            SampleError: see ``pixels``.
        """
        if self.kind == MediaKind.image:
            size = upright_size(read_image(self.source, allow_http))
            return MediaRequest.of(MediaInfo(MediaKind.image, *size), resolution, self.options)
        video = read_video(self.source, allow_http)
        if isinstance(video, (bytes, Path)):
            return MediaRequest.of(probe_video(video), resolution, self.options)
        return frames_request(video, self._rate(), resolution, self.options)

    def pixels(
        self,
        resolution: ResolutionSettings,
        allow_http: bool = False,
        backend: VideoBackend = VideoBackend.pyav,
        scaled_jpeg: bool = False,
        out: np.ndarray | None = None,
    ) -> Pixels:
        """Decode and resize it, once. ``scaled_jpeg``: see ``images.decode_image``; ``out``: ``images.place_patches``.

        Raises:
            SampleError: it cannot be read, is broken or too thin, or its options do not fit it.
        """
        if self.kind == MediaKind.image:
            image = read_image(self.source, allow_http)
            return Pixels(self.kind, *cut_image(image, resolution, self.options, scaled_jpeg, out), 0.0)
        video = read_video(self.source, allow_http)
        if isinstance(video, (bytes, Path)):
            decoded = decode_video(video, resolution, self.options, backend, out)
        else:
            decoded = decode_frames(video, self._rate(), resolution, self.options, out)
        return Pixels(self.kind, decoded.patches, decoded.grid, decoded.seconds_per_grid)

    def published_pixels(self, min_pixels: int, max_pixels: int, allow_http: bool = False) -> Pixels:
        """As the published pipeline makes them: resized twice, and with the limits of the image processor.

        Raises:
            SampleError: it cannot be read or is broken.
            ValueError: what the published code refuses.
        """
        if self.kind == MediaKind.image:
            fetched = published_pixels.fetch_image(read_image(self.source, allow_http), self.options)
            return Pixels(self.kind, *published_pixels.image_patches(fetched, min_pixels, max_pixels), 0.0)
        frames, fps = published_pixels.fetch_video(read_video(self.source, allow_http), self.options)
        return Pixels(self.kind, *published_pixels.video_patches(frames, min_pixels, max_pixels), 1 / fps)

    def _rate(self) -> float:
        if "fps" not in self.options:
            raise SampleError("a video given as frames does not know its rate: say fps=FRAMES PER SECOND")
        return float(self.options["fps"])


def split_media(
    messages: Sequence[Mapping[str, Any]], add_vision_id: bool = False, options: Mapping[str, Any] | None = None
) -> tuple[list[Message], list[Medium]]:
    """Take the media out of a conversation.

    Content items are recognised as in the published template: by ``type``, or by a key ``image``, ``image_url`` or
    ``video``; everything else must hold ``text``.

    Args:
        messages: a conversation; it is not changed.
        add_vision_id: write "Picture 1: " or "Video 1: " before each medium, counted over the conversation.
        options: for every medium that has none of that name; images take those that images have.

    Returns:
        The conversation with the number of each medium for its name, and the media in order of appearance.

    Raises:
        SampleError: an item without text or source, or with options that cannot hold together.
    """
    media: list[Medium] = []
    seen = dict.fromkeys(MediaKind, 0)
    plain: list[Message] = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, (list, tuple)):
            plain.append(message)  # type: ignore[arg-type]  # text, or refused by parse_turns
            continue
        items: list[Any] = []
        for item in content:
            kind = _kind_of(item)
            if kind is None:
                items.append({"type": "text", "text": item["text"]} if _holds_text(item) else item)
                continue
            seen[kind] += 1
            if add_vision_id:
                label = "Picture" if kind == MediaKind.image else "Video"
                items.append({"type": "text", "text": f"{label} {seen[kind]}: "})
            items.append({"type": kind.value, kind.value: str(len(media))})
            media.append(Medium(kind, _source_of(item, kind), media_options(_with_defaults(item, kind, options), kind)))
        plain.append({**message, "content": items})
    return plain, media


def _with_defaults(item: Mapping[str, Any], kind: MediaKind, options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """``item`` with the options of the call that neither it nor its kind excludes."""
    defaults = dict(options or {})
    if kind == MediaKind.image:
        defaults = {name: value for name, value in defaults.items() if name in IMAGE_OPTION_NAMES}
    for one, others in (("fps", ("nframes",)), ("nframes", ("fps", "min_frames", "max_frames"))):
        if one in item:
            defaults = {name: value for name, value in defaults.items() if name not in others}
    return {**defaults, **item}


def _kind_of(item: Any) -> MediaKind | None:
    if not isinstance(item, Mapping):
        return None
    kind = item.get("type")
    if kind in ("image", "image_url") or "image" in item or "image_url" in item:
        return MediaKind.image
    if kind in ("video", "video_url") or "video" in item or "video_url" in item:
        return MediaKind.video
    return None


def _holds_text(item: Any) -> bool:
    return isinstance(item, Mapping) and "text" in item and item.get("type", "text") == "text"


def _source_of(item: Mapping[str, Any], kind: MediaKind) -> Any:
    for key in (kind.value, f"{kind.value}_url", *_SOURCE_KEYS):
        source = item.get(key)
        if isinstance(source, Mapping):
            source = source.get("url")
        if source is not None:
            return f"data:;base64,{source}" if key == "base64" else source
    raise SampleError(f"{kind.value} without a source; use {{'type': '{kind.value}', '{kind.value}': PATH}}")
