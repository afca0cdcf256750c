"""Conversations -> text of the published chat template -> token ids and labels.

The template: every message is ``<|im_start|>ROLE\\nCONTENT<|im_end|>\\n``; a conversation without a system message gets
a default one; an image or video in the content is ``<|vision_start|>PADS<|vision_end|>`` with one pad for each token
of its grid.

Special tokens are put in by id, never by text: whatever stands in a message, "<|image_pad|>" included, is encoded as
ordinary characters. Tokens that are words of the language, such as <|box_start|> or <think>, stay tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from keye_train.model.packed import IGNORE_INDEX
from keye_train.model.token_counts import TokenCounter
from keye_train.sample import MediaKind, SampleError

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."
ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = (
    "{% set seen = namespace(images=0, videos=0) %}"
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + DEFAULT_SYSTEM_PROMPT + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'image' or 'image' in item or 'image_url' in item %}"
    "{% set seen.images = seen.images + 1 %}{% if add_vision_id %}Picture {{ seen.images }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif item['type'] == 'video' or 'video' in item or 'video_url' in item %}"
    "{% set seen.videos = seen.videos + 1 %}{% if add_vision_id %}Video {{ seen.videos }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The published template in Jinja, for transformers; ``add_vision_id`` numbers the media."""

Message = dict[str, Any]


class MediaSlot(NamedTuple):
    """Place of an image or video in a conversation."""

    kind: MediaKind
    name: str  # key of Sample.media


class Turn(NamedTuple):
    """One message: text and media in order, neighbouring texts joined."""

    role: str
    content: Sequence[str | MediaSlot]


_DEFAULT_SYSTEM = Turn("system", [DEFAULT_SYSTEM_PROMPT])


@dataclass(frozen=True)
class EncodedChat:
    """Token ids of a conversation."""

    input_ids: Tensor  # [L] int64
    labels: Tensor  # [L] int64, not shifted; IGNORE_INDEX except on the text of assistant turns and their <|im_end|>


class TextSize(NamedTuple):
    """Language tokens of a conversation without the pads of its media."""

    tokens: int
    cuts: tuple[tuple[int, int], ...]  # tokens and media up to the end of each answer, but not of one that ends it all


def parse_turns(messages: Sequence[Message]) -> list[Turn]:
    """Check a conversation and put the default system turn first where it has none.

    Raises:
        SampleError: not a list of messages as ``Sample`` describes them.
    """
    if not messages:
        raise SampleError("conversation without messages")
    turns = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise SampleError(f"message with role {role!r}; roles are {', '.join(ROLES)}")
        turns.append(Turn(role, _parse_content(message.get("content"))))
    if turns[0].role != "system":
        turns.insert(0, _DEFAULT_SYSTEM)
    return turns


def media_slots(messages: Sequence[Message]) -> list[MediaSlot]:
    """Images and videos of a conversation in order of appearance.

    Raises:
        SampleError: see ``parse_turns``.
    """
    return slots_of(parse_turns(messages))


def slots_of(turns: Sequence[Turn]) -> list[MediaSlot]:
    """Images and videos of turns in order of appearance."""
    return [part for turn in turns for part in turn.content if isinstance(part, MediaSlot)]


def last_answer(messages: Sequence[Message]) -> str:
    """Text of the last assistant turn.

    Raises:
        SampleError: there is none, or it is empty; see also ``parse_turns``.
    """
    for turn in reversed(parse_turns(messages)):
        if turn.role == "assistant":
            text = "".join(part for part in turn.content if isinstance(part, str))
            if text.strip():
                return text
            break
    raise SampleError("conversation without an answer: its last assistant turn is missing or empty")


def first_answers(messages: Sequence[Message], answers: int) -> list[Message]:
    """The messages up to and with so many assistant turns; 0: all of them."""
    found = 0
    for number, message in enumerate(messages, 1):
        found += message.get("role") == "assistant"
        if answers and found == answers:
            return list(messages[:number])
    return list(messages)


def chat_text(messages: Sequence[Message], generation_prompt: bool = False) -> str:
    """Text of the published template, with one pad for each image or video.

    For people and for comparison with other implementations; training encodes with ``encode_conversation``.

    Raises:
        SampleError: see ``parse_turns``.
    """
    text = ""
    for turn in parse_turns(messages):
        text += f"<|im_start|>{turn.role}\n"
        for part in turn.content:
            text += part if isinstance(part, str) else f"<|vision_start|><|{part.kind.value}_pad|><|vision_end|>"
        text += "<|im_end|>\n"
    return text + ("<|im_start|>assistant\n" if generation_prompt else "")


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    media_tokens: Sequence[int],
    generation_prompt: bool = False,
) -> EncodedChat:
    """Encode a conversation for training, or with ``generation_prompt`` as a prompt.

    The text of an assistant turn is encoded apart from its header, so that the boundary of the labels is always a
    boundary of tokens, as it is while generating.

    Args:
        tokenizer: a fast tokenizer with the special tokens of Keye.
        messages: see ``Sample``.
        media_tokens: language tokens of each image and video, in order of appearance.

    Raises:
        SampleError: see ``parse_turns``.
        ValueError: ``media_tokens`` does not match the conversation.
    """
    return encode_turns(tokenizer, parse_turns(messages), media_tokens, generation_prompt)


def encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Turn],
    media_tokens: Sequence[int],
    generation_prompt: bool = False,
) -> EncodedChat:
    """``encode_conversation`` of turns that ``parse_turns`` has checked."""
    encoder = _encoder(tokenizer)
    counts = iter(media_tokens)
    pieces = [piece for turn in turns for piece in _turn_ids(encoder, turn, counts)]
    if next(counts, None) is not None:
        raise ValueError(f"{len(media_tokens)} token counts for fewer images and videos")
    if generation_prompt:
        pieces.append(([encoder.im_start, *encoder.encode_header("assistant\n")], 1, False))
    length = sum(len(piece) * times for piece, times, _ in pieces)
    ids = np.empty(length, dtype=np.int64)
    labels = np.full(length, IGNORE_INDEX, dtype=np.int64)
    end = 0
    for piece, times, learnt in pieces:
        place = slice(end, end := end + len(piece) * times)
        ids[place] = piece  # a repeated piece is a single id
        if learnt:
            labels[place] = ids[place]
    return EncodedChat(torch.from_numpy(ids), torch.from_numpy(labels))


def text_token_count(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generation_prompt: bool = False
) -> int:
    """Language tokens of a conversation without the pads of its media: what ``grid_tokens`` adds to.

    Raises:
        SampleError: see ``parse_turns``.
    """
    return len(encode_conversation(tokenizer, messages, [0] * len(media_slots(messages)), generation_prompt).input_ids)


def text_sizes(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Turn]]) -> list[TextSize]:
    """``text_token_count`` of many conversations, many times as fast: see ``TokenCounter``.

    Args:
        tokenizer: a fast tokenizer with the special tokens of Keye.
        conversations: each as ``parse_turns`` gives it.
    """
    encoder = _encoder(tokenizer)
    texts: list[str] = []  # of all turns in order, without the constant ones
    plans = [[_plan(encoder, turn, texts) for turn in turns] for turns in conversations]
    counts = encoder.counter.counts(texts)
    first, sizes = 0, []
    for plan in plans:
        tokens, slots, cuts = 0, 0, []
        for constant, media, behind, answers in plan:
            tokens += constant + sum(counts[first:behind])
            first = behind
            slots += media
            if answers:
                cuts.append((tokens, slots))
        if plan and plan[-1][3]:
            cuts.pop()
        sizes.append(TextSize(tokens, tuple(cuts)))
    return sizes


def _plan(encoder: _Encoder, turn: Turn, texts: list[str]) -> tuple[int, int, int, bool]:
    """Puts the texts of a turn behind those there are.

    Returns:
        Other tokens, media, how many texts there are then, whether it is an answer.
    """
    header, content = _header(turn)
    constant = encoder.frame_tokens
    if (ids := encoder.headers.get(header)) is not None:
        constant += len(ids)
    else:
        texts.append(header)
    media = 0
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        else:
            media += 1
    return constant + 2 * media, media, len(texts), turn.role == "assistant"  # two around the pads of each


def _parse_content(content: Any) -> list[str | MediaSlot]:
    if isinstance(content, str):
        return [_checked(content)]
    if not isinstance(content, list):
        raise SampleError(f"message content of type {type(content).__name__}; use a string or a list")
    parts: list[str | MediaSlot] = []
    for item in content:
        part = _parse_item(item)
        if isinstance(part, str) and parts and isinstance(before := parts[-1], str):
            parts[-1] = before + part
        else:
            parts.append(part)
    return parts


def _parse_item(item: Any) -> str | MediaSlot:
    kind = item.get("type") if isinstance(item, dict) else None
    value = item.get(kind) if isinstance(kind, str) else None
    if not isinstance(value, str):
        raise SampleError(f'content item {str(item)[:80]!r}; use e.g. {{"type": "text", "text": ...}}')
    if kind == "text":
        return _checked(value)
    if kind in ("image", "video"):
        return MediaSlot(MediaKind(kind), value)
    raise SampleError(f"content item of type {kind!r}; types are text, image, video")


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError("text with half a surrogate pair, which no tokenizer can read") from error
    return text


def _turn_ids(encoder: _Encoder, turn: Turn, counts: Iterator[int]) -> Iterator[tuple[list[int], int, bool]]:
    """A turn piece by piece: token ids, how often they are repeated (single ids only), whether they are learnt."""
    answer = turn.role == "assistant"
    header, content = _header(turn)
    yield [encoder.im_start, *encoder.encode_header(header)], 1, False
    for part in content:
        if isinstance(part, str):
            yield encoder.encode(part), 1, answer
            continue
        count = next(counts, None)
        if count is None:
            raise ValueError("more images and videos in the conversation than token counts")
        pad = encoder.image_pad if part.kind == MediaKind.image else encoder.video_pad
        yield [encoder.vision_start], 1, False
        yield [pad], count, False
        yield [encoder.vision_end], 1, False
    yield [encoder.im_end], 1, answer
    yield encoder.newline, 1, False


def _header(turn: Turn) -> tuple[str, Sequence[str | MediaSlot]]:
    """The text that opens a turn, and what is left of its content."""
    role, content = turn
    if role == "assistant":
        return "assistant\n", content
    if content and isinstance(opening := content[0], str):
        return f"{role}\n{opening}", content[1:]  # one text for the tokenizer, as in the published pipeline
    return f"{role}\n", content


@dataclass(frozen=True)
class _Encoder:
    """A private copy of a tokenizer's core that reads special tokens in texts as ordinary characters."""

    core: Tokenizer
    im_start: int
    im_end: int
    vision_start: int
    vision_end: int
    image_pad: int
    video_pad: int
    newline: list[int]
    headers: dict[str, list[int]]  # ids of the constant openings of turns
    counter: TokenCounter

    @property
    def frame_tokens(self) -> int:
        """The tokens that open and close a turn."""
        return 2 + len(self.newline)

    def encode(self, text: str) -> list[int]:
        (encoding,) = self.core.encode_batch_fast([text], add_special_tokens=False)  # fast: without offsets
        return encoding.ids

    def encode_header(self, text: str) -> list[int]:
        """As ``encode``, at once for the openings that nearly every conversation has."""
        return found if (found := self.headers.get(text)) is not None else self.encode(text)


@lru_cache(maxsize=8)
def _encoder(tokenizer: PreTrainedTokenizerBase) -> _Encoder:
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.encode_special_tokens = True
    core.no_padding()
    core.no_truncation()
    names = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
    found = {name: core.token_to_id(f"<|{name}|>") for name in names}
    ids = {name: token_id for name, token_id in found.items() if token_id is not None}
    missing = [f"<|{name}|>" for name in names if name not in ids]
    if missing:
        raise ValueError(f"the tokenizer has no {', '.join(missing)}: add them as special tokens")
    texts = (*(f"{role}\n" for role in ROLES), f"system\n{DEFAULT_SYSTEM_PROMPT}")
    headers = {text: core.encode(text, add_special_tokens=False).ids for text in texts}
    newline = core.encode("\n", add_special_tokens=False).ids
    return _Encoder(core, **ids, newline=newline, headers=headers, counter=TokenCounter(core))
