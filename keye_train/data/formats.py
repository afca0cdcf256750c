"""From the members of one tar sample to a conversation: the layouts that shards may have.

===================================================  ==================================================================
members of a sample                                  becomes
===================================================  ==================================================================
``.json`` with ``messages`` (+ media)                that conversation; its media are named in it, or marked in texts
                                                     by ``<image>`` / ``<video>`` (with lists ``images``, ``videos``)
``.json`` with ``conversations`` (+ media)           LLaVA: turns ``from`` / ``value`` with such markers
``.json`` with ``texts`` and ``images``              interleaved (OBELICS): two lists, one of both null at each place
``.json`` with ``text_list`` and ``image_info``      interleaved (MMC4): images before the sentences that they match
image or video + ``.txt``                            user: the media, assistant: the text (LAION, img2dataset)
image or video + ``.json`` ``caption``               the same; several images have numbers: ``.0.jpg``, ``.1.jpg``
``.txt``, or ``.json`` with ``text``                 pure text, all of it spoken by the assistant
any, in a folder with ``.nv-meta/dataset.yaml``      what its ``field_map`` says (megatron-energon; see ``energon``)
===================================================  ==================================================================

Documents are spoken by the assistant as a whole, with images in their places. Names in ``images`` that are no members
(URLs, paths of the original files) stand for the members in order where their order is evident.

Shards come from strangers. Nothing is executed or unpickled, and nothing is looked up outside the sample.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from keye_train.data.layouts import (
    fill_markers,
    has_markers,
    in_order,
    llava_messages,
    media_part,
    parallel_lists,
    placed_images,
    resolve_media,
)
from keye_train.model.chat import MediaSlot, Turn, parse_turns, slots_of
from keye_train.sample import MediaKind, Sample, SampleError, SampleRef

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
VIDEO_SUFFIXES = frozenset({"mp4", "mov", "webm", "mkv", "avi"})
_KIND_KEYS = [(kind, kind.value, f"{kind.value}s") for kind in MediaKind]  # and the keys that list media of a kind
REFUSED_SUFFIXES = frozenset({"pyd", "pkl", "pickle", "pth", "pt"})
"""Members that only unpickling could read, which runs whatever code they carry."""


def split_member_name(name: str) -> tuple[str, str]:
    """Split a member's name into the sample's key and the rest, at the first dot after the last slash.

    ``photos/000017.0.jpg`` -> (``photos/000017``, ``0.jpg``), the convention of WebDataset.

    Raises:
        SampleError: the name leaves the archive or has no key or no ending.
    """
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:  # bytes that are not UTF-8 arrive from tarfile as lone surrogates
        raise SampleError(f"member name {name!r} is not UTF-8") from error
    if name.startswith("/") or "\\" in name or (".." in name and ".." in name.split("/")):
        raise SampleError(f"member name {name!r} leaves the archive")
    folder, slash, base = name.rpartition("/")
    stem, dot, rest = base.partition(".")
    if not stem or not dot or not rest:
        raise SampleError(f"member name {name!r} is not KEY.ENDING")
    return folder + slash + stem, rest


@lru_cache(1024)  # a few names come again in all samples
def media_kind(member: str) -> MediaKind | None:
    """Kind of media that a member's ending announces; None for anything else."""
    suffix = member.rpartition(".")[2].lower()
    if suffix in IMAGE_SUFFIXES:
        return MediaKind.image
    return MediaKind.video if suffix in VIDEO_SUFFIXES else None


@lru_cache(1024)
def _is_refused(member: str) -> bool:
    return member.rpartition(".")[2].lower() in REFUSED_SUFFIXES


def parse_sample(ref: SampleRef, members: Mapping[str, bytes]) -> Sample:
    """Read a sample in any of the accepted layouts; arguments and errors as for ``parse_with_turns``."""
    return parse_with_turns(ref, members)[0]


def parse_with_turns(ref: SampleRef, members: Mapping[str, bytes]) -> tuple[Sample, list[Turn], list[MediaSlot]]:
    """Read a sample in any of the accepted layouts, its conversation as turns, and the media that these mention.

    Args:
        ref: where the sample stands.
        members: name without the key (``json``, ``0.jpg``) -> bytes.

    Raises:
        SampleError: the members are none of the layouts, or contradict themselves.
    """
    for name in members:
        if _is_refused(name):
            raise SampleError(f"member .{name} would have to be unpickled, which is refused")
    described = _parse_json(members["json"]) if "json" in members else {}
    media = {name: data for name, data in members.items() if media_kind(name)}
    messages, default_task = _conversation(described, members, list(media))
    turns, slots = _check_messages(messages, media)
    task = described.pop("task", default_task)
    if not isinstance(task, str):
        raise SampleError(f"'task' is {type(task).__name__}, expected a string")
    return Sample(ref, messages, {slot.name: media[slot.name] for slot in slots}, task, described), turns, slots


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise SampleError(f"member .json is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise SampleError(f"member .json holds a {type(value).__name__}, expected an object")
    return value


def _conversation(
    described: dict[str, Any], members: Mapping[str, bytes], media: list[str]
) -> tuple[list[dict[str, Any]], str]:
    """Conversation and default task; takes what it used out of ``described``."""
    if "messages" in described:
        messages = described.pop("messages")
        if media and has_markers(messages):
            messages = fill_markers(messages, _marked_media(described, media))
        return messages, "chat"
    if "conversations" in described:
        return fill_markers(llava_messages(described.pop("conversations")), _marked_media(described, media)), "chat"
    if "text_list" in described and "image_info" in described:
        infos = described.pop("image_info")
        if not isinstance(infos, list) or not all(isinstance(info, dict) for info in infos):
            raise SampleError("'image_info' is no list of objects")
        images = [info.get("image_name") for info in infos]
        places = [info.get("matched_text_index") for info in infos]
        return placed_images(described.pop("text_list"), images, places, media), "interleaved"
    if "texts" in described and "images" in described:
        return parallel_lists(described.pop("texts"), described.pop("images"), media), "interleaved"
    return _plain_messages(described, members, media)


def _marked_media(described: dict[str, Any], media: list[str]) -> dict[MediaKind, list[str]]:
    """Members of each kind in the order in which markers stand for them.

    Raises:
        SampleError: the sample has several media of a kind in no evident order.
    """
    found = {}
    for kind, word, words in _KIND_KEYS:
        names = [name for name in media if media_kind(name) is kind]
        listed = [described.pop(key) for key in (word, words) if described.get(key) is not None]
        ordered = resolve_media(listed[0], names, word) if listed else in_order(names)
        if ordered is None:
            raise SampleError(f"{sorted(names)} have no order: number them, or list them under '{words}'")
        found[kind] = ordered
    return found


def _plain_messages(
    described: dict[str, Any], members: Mapping[str, bytes], media: list[str]
) -> tuple[list[dict[str, Any]], str]:
    """Conversation and task of a caption pair or a pure text."""
    if "txt" in members:
        try:
            text: Any = members["txt"].decode("utf-8")
        except UnicodeDecodeError as error:
            raise SampleError(f"member .txt is not UTF-8: {error}") from error
    else:
        text = described.pop("caption", None) if media else described.pop("text", None)
    if not isinstance(text, str):
        raise SampleError(
            f"members {sorted(members)} are no known layout: give .json with 'messages', an image with .txt or "
            ".json 'caption', or .txt alone"
        )
    if not text.strip():
        raise SampleError("the text is empty")
    answer = {"role": "assistant", "content": text.strip() if media else text}
    if not media:
        return [answer], "text"
    ordered = in_order(media)
    if ordered is None:
        raise SampleError(
            f"{sorted(media)} with one caption: number several media from 0 on, or give .json with 'messages'"
        )
    parts = [media_part(name, kind) for name in ordered if (kind := media_kind(name)) is not None]
    return [{"role": "user", "content": parts}, answer], "caption"


def _check_messages(messages: Any, media: Mapping[str, bytes]) -> tuple[list[Turn], list[MediaSlot]]:
    """Turns of a conversation, and the media in them.

    Raises:
        SampleError: it is not in the chat format, names media that are not there, or has nothing to learn.
    """
    if not isinstance(messages, list):
        raise SampleError(f"'messages' is {type(messages).__name__}, expected a list")
    turns = parse_turns(messages)
    if not any(turn.role == "assistant" for turn in turns):
        raise SampleError("no assistant turn: nothing to learn from")
    slots = slots_of(turns)
    for slot in slots:
        if slot.name not in media or media_kind(slot.name) != slot.kind:
            raise SampleError(f"messages name the {slot.kind.value} {slot.name!r}; the sample's media: {sorted(media)}")
    return turns, slots
