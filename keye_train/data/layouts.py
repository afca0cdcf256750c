"""Conversations out of the JSON that other projects write: interleaved documents, and texts with media markers.

Nothing is looked up outside the sample: an image is a member of the tar, named in the JSON or counted off in order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from keye_train.sample import MediaKind, SampleError

Message = dict[str, Any]

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""``from`` of a LLaVA conversation -> role."""

# LLaVA writes a marker on a line of its own; that line break belongs to the marker, not to the text.
_MARKER = re.compile(r"\n?<(image|video)>\n?")
_NUMBERED = re.compile(r"(\d{1,9})\.[^.]+")


def media_part(name: str, kind: MediaKind) -> dict[str, str]:
    """Content item of one image or video."""
    return {"type": kind.value, kind.value: name}


def text_part(text: str) -> dict[str, str]:
    """Content item of a text."""
    return {"type": "text", "text": text}


def in_order(names: Iterable[str]) -> list[str] | None:
    """Members in the order of their numbers (``0.jpg``, ``1.png``, ...); None where they have no evident order."""
    names = list(names)
    if len(names) < 2:
        return names
    numbers = {int(match[1]): name for name in names if (match := _NUMBERED.fullmatch(name))}
    first = min(numbers, default=0)
    if len(numbers) != len(names) or sorted(numbers) != list(range(first, first + len(names))):
        return None
    return [numbers[number] for number in sorted(numbers)]


def resolve_media(listed: Any, names: Sequence[str], what: str) -> list[str]:
    """Members that stand for the entries of a list in the JSON.

    Entries are names of members. Where they are something else, such as URLs or paths of the original files, the
    members stand for them in order, if there are as many and their order is evident.

    Raises:
        SampleError: neither.
    """
    entries = [listed] if isinstance(listed, str) else listed
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise SampleError(f"'{what}' is no list of names")
    if all(entry in names for entry in entries):
        return entries
    ordered = in_order(names)
    if ordered is None or len(ordered) != len(entries) or any(entry in names for entry in entries):
        raise SampleError(
            f"'{what}' names {[entry[:80] for entry in entries[:4]]}; the sample's media: {sorted(names)}"
        )
    return ordered


# ---------------------------------------------------------------------------------------------------- documents


def parallel_lists(texts: Any, images: Any, names: Sequence[str]) -> list[Message]:
    """A document as OBELICS has it: two lists of one length; at each place either a text or an image, the other null.

    Texts that follow each other are paragraphs.

    Raises:
        SampleError: the lists differ in length, or an entry is neither or both.
    """
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise SampleError("'texts' and 'images' are no two lists of one length")
    found = iter(resolve_media([image for image in images if image is not None], names, "images"))
    parts: list[dict[str, str]] = []
    for place, (text, image) in enumerate(zip(texts, images, strict=True)):
        if (text is None) == (image is None) or not isinstance(text, str | None):
            raise SampleError(f"place {place} of 'texts' and 'images' holds not exactly one of text and image")
        if text is None:
            parts.append(media_part(next(found), MediaKind.image))
        else:
            after_text = bool(parts) and parts[-1]["type"] == "text"
            parts.append(text_part("\n\n" + text if after_text else text))
    return document(parts)


def placed_images(texts: Any, images: Any, places: Any, names: Sequence[str]) -> list[Message]:
    """A document as MMC4 has it: sentences, and images each of which stands before the sentence that it matches.

    Args:
        texts: sentences, joined by spaces.
        images: names of the images.
        places: index of the sentence of each image.
        names: media of the sample.

    Raises:
        SampleError: the lists do not fit together.
    """
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise SampleError("the sentences of the document are no list of strings")
    found = resolve_media(images, names, "images")
    if not isinstance(places, list) or len(places) != len(found):
        raise SampleError("the document does not say where each of its images stands")
    before: dict[int, list[str]] = {}
    for name, place in zip(found, places, strict=True):
        if type(place) is not int or not 0 <= place < len(texts):
            raise SampleError(f"image {name} stands at sentence {place!r} of {len(texts)}")
        before.setdefault(place, []).append(name)
    parts: list[dict[str, str]] = []
    for place, text in enumerate(texts):
        parts += [media_part(name, MediaKind.image) for name in before.get(place, [])]
        parts.append(text_part(text if place + 1 == len(texts) else text + " "))
    return document(parts)


def document(parts: list[dict[str, str]]) -> list[Message]:
    """All of it spoken by the assistant, so that every text is learnt.

    Raises:
        SampleError: no text.
    """
    if not any(part["type"] == "text" and part["text"].strip() for part in parts):
        raise SampleError("the text is empty")
    return [{"role": "assistant", "content": parts}]


# ------------------------------------------------------------------------------------------------------ markers


def has_markers(messages: Any) -> bool:
    """Whether messages with plain texts mark the places of media by ``<image>`` or ``<video>``."""
    if not isinstance(messages, list):
        return False
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    texts = [content for content in contents if isinstance(content, str)]
    return len(texts) == len(contents) and any(_MARKER.search(text) for text in texts)


def llava_messages(turns: Any) -> list[Message]:
    """``[{"from": "human", "value": ...}, ...]`` -> messages with texts.

    Raises:
        SampleError: another form, or another speaker than those of ``SPEAKERS``.
    """
    if not isinstance(turns, list):
        raise SampleError(f"'conversations' is {type(turns).__name__}, expected a list")
    messages = []
    for turn in turns:
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(speaker, str) or speaker not in SPEAKERS or not isinstance(text, str):
            raise SampleError(f"turn from {speaker!r} in 'conversations'; speakers are {', '.join(SPEAKERS)}")
        messages.append({"role": SPEAKERS[speaker], "content": text})
    return messages


def fill_markers(messages: list[Message], media: dict[MediaKind, list[str]]) -> list[Message]:
    """Messages with the media in the places of their markers, in order.

    Args:
        messages: contents are texts.
        media: members of each kind in the order in which the markers stand for them.

    Raises:
        SampleError: as many markers as media are not there.
    """
    waiting = {kind: iter(names) for kind, names in media.items()}
    markers = dict.fromkeys(media, 0)
    filled = []
    for message in messages:
        text = message["content"]
        if "<image>" not in text and "<video>" not in text:
            filled.append(message)
            continue
        pieces = _MARKER.split(text)
        parts = [text_part(pieces[0])] if pieces[0] else []
        for word, behind in zip(pieces[1::2], pieces[2::2], strict=True):
            kind = MediaKind(word)
            markers[kind] += 1
            if (name := next(waiting[kind], None)) is not None:
                parts.append(media_part(name, kind))
            if behind:
                parts.append(text_part(behind))
        filled.append(message | {"content": parts})
    for kind, names in media.items():
        if markers[kind] != len(names):
            raise SampleError(f"{markers[kind]} markers <{kind.value}> in the conversation for {len(names)} members")
    return filled
