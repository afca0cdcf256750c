"""How many tokens texts have, where the same words come again and again.

A tokenizer of the GPT family first cuts a text into words, each encoded by itself. Its patterns join a space to what
follows it, or to white space before it, but never to any other character before it; and they look ahead only. So

    count("two red boats.") = count("two") + count(" red") + count(" boats.")

with a cut before each space that does not follow white space, whatever stands around it. Most of these pieces were
counted before. Those that were not are given to the tokenizer itself, so nothing of it is repeated here but this one
property, which holds for ``WORD_PATTERNS``; texts of other tokenizers are counted whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from tokenizers import Tokenizer, models, normalizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_MARKS_AND_SPACE = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD_PATTERNS = frozenset(
    _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + _MARKS_AND_SPACE for digits in (r"\p{N}", r"\p{N}{1,3}")
)
"""Patterns of Qwen (Keye's) and of Llama 3, in which no alternative has a space behind anything but white space."""

KEPT_PIECES = 2**18
"""Counts that are kept, about 30 MB; then all are forgotten: the frequent ones are soon back."""
KEPT_LENGTH = 48
"""Characters of the longest piece that is kept. Languages without spaces have long ones, which do not come again."""

# Python's \s holds all that the tokenizers' does.
_SPACE_BEHIND_WHITE = re.compile(r"\s ")
# Goes on behind white space, and ends before a space behind another character.
_PIECE = re.compile(r"\s*\S*(?:[^\S ]\s*\S*)*")


class TokenCounter:
    """Counts the tokens of texts; remembers pieces of them from call to call."""

    def __init__(self, core: Tokenizer) -> None:
        """Args:
        core: the tokenizer, which is not changed later on; it neither pads nor truncates.
        """
        self._core = core
        self._cuts = cuts_before_spaces(core)
        self._forget()

    def _forget(self) -> None:
        self._opening = {"": 0}  # pieces at the start of a text -> tokens
        self._following: dict[str, int] = {}  # pieces that follow a space, which is not part of the key -> tokens

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, without those that a tokenizer adds around it."""
        if not self._cuts:
            return self._encoded(texts)
        if len(self._opening) + len(self._following) > KEPT_PIECES:
            self._forget()
        opening, following = self._opening, self._following
        found, unknown = [], []
        for place, text in enumerate(texts):
            first, *rest = text.split(" ")
            try:  # a piece that ends with white space is never kept, so that no cut behind it goes unnoticed
                found.append(opening[first] + sum(map(following.__getitem__, rest)))
            except KeyError:
                found.append(0)
                unknown.append(place)
        for place, count in zip(unknown, self._learn([texts[place] for place in unknown]), strict=True):
            found[place] = count
        return found

    def _learn(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text; its pieces are kept."""
        cut = [_pieces(text) for text in texts]
        known = {piece: self._known(piece) for piece in set(chain.from_iterable(cut))}
        missing = [piece for piece, count in known.items() if count is None]
        counts = dict(zip(missing, self._encoded(missing), strict=True))
        for piece, count in counts.items():
            if len(piece) <= KEPT_LENGTH and not piece[-1].isspace():
                if piece[0] == " ":
                    self._following[piece[1:]] = count
                else:
                    self._opening[piece] = count
        known |= counts
        return [sum(filter(None, map(known.__getitem__, pieces))) for pieces in cut]

    def _known(self, piece: str) -> int | None:
        return self._following.get(piece[1:]) if piece.startswith(" ") else self._opening.get(piece)

    def _encoded(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text from the tokenizer; equal texts are encoded once, all at a time."""
        different = dict.fromkeys(texts)
        encodings = self._core.encode_batch_fast([*different], add_special_tokens=False)  # fast: without offsets
        known = dict(zip(different, map(len, encodings), strict=True))
        return [known[text] for text in texts]


def _pieces(text: str) -> list[str]:
    """A text cut before each space that does not follow white space; empty pieces may be among them."""
    if _SPACE_BEHIND_WHITE.search(text):
        return _PIECE.findall(text)
    first, *rest = text.split(" ")
    return [first, *[f" {piece}" for piece in rest]]


def cuts_before_spaces(core: Tokenizer) -> bool:
    """Whether texts of a tokenizer may be cut before each space that does not follow white space.

    So that neither its normalizer nor its words nor its added tokens reach across such a place.
    """
    normal = core.normalizer is None or isinstance(core.normalizer, normalizers.NFC)  # a space composes with nothing
    model = core.model
    exact = isinstance(model, models.BPE) and not model.dropout
    return normal and exact and _words_end_at_spaces(core) and not any(map(_reaches_out, _added_tokens(core)))


def _words_end_at_spaces(core: Tokenizer) -> bool:
    if core.pre_tokenizer is None:
        return False
    described = json.loads(core.pre_tokenizer.__getstate__())
    steps = described["pretokenizers"] if described["type"] == "Sequence" else [described]
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return False
    if steps[-1]["use_regex"]:  # the pattern of GPT-2
        return len(steps) == 1
    return len(steps) == 2 and _is_known_split(steps[0])


def _is_known_split(step: dict[str, Any]) -> bool:
    shape = {name: step.get(name) for name in ("type", "behavior", "invert")}
    pattern = step.get("pattern", {}).get("Regex")
    return shape == {"type": "Split", "behavior": "Isolated", "invert": False} and pattern in WORD_PATTERNS


def _added_tokens(core: Tokenizer) -> Iterable[Any]:
    return core.get_added_tokens_decoder().values()


def _reaches_out(token: Any) -> bool:
    """Whether what stands beside an added token decides on it, or it on that."""
    return bool(token.lstrip or token.rstrip or token.single_word) or any(map(str.isspace, token.content))
