"""Promises: counting pieces of texts gives the counts of whole texts, whatever was counted before; where a tokenizer
reads across spaces, nothing is cut."""

from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from keye_train.model import token_counts
from keye_train.model.token_counts import WORD_PATTERNS, TokenCounter, cuts_before_spaces

TRAINED_ON = [
    "the red boat  and the  two red boats' oars\n\n  - they're red\n - it's 12 \n\tred\r\n  <think>\n\nthe end ",
    "你好，红色的船。 船 is red\u3000the\u3000boat\u00a0 red \u2028 e\u0301te\u0301 été",
]
TRAINED_ON += ["the   \n \n \n the    ", "red \n \n \n  ", "red \t \t the \t \t "]
PARTS = ["the", " red", "Red", "boat", "'s", " 're", "'S", "1", "23", "!", " ...", "，", "你好", "é", "e", "\u0301"]
PARTS += [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\u3000",
    "\u00a0",
    "\u0085",
    "\u001c",
    "\u2028",
    "\u200b",
    "\u180e",
    "\u017f",
    "\0",
]
PARTS += ["<think>", "<|im_start|>", "<thi", "🙂", "\ufeff", "x" * 60]


def words(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


QWEN = min(WORD_PATTERNS, key=len)
CUT = {pattern: words(pattern) for pattern in WORD_PATTERNS}
CUT["GPT-2"] = pre_tokenizers.ByteLevel(add_prefix_space=False)
WHOLE = {
    "a space in front": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "lines": words(r"[^\n]+\n*|\n+"),
    "no words": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
}


@cache
def trained(name: str) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = (CUT | WHOLE)[name]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TRAINED_ON * 3,
        trainers.BpeTrainer(vocab_size=420, special_tokens=["<|im_start|>"], initial_alphabet=alphabet),
    )
    core.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    core.encode_special_tokens = True
    return core


def whole(core: Tokenizer, texts: list[str]) -> list[int]:
    return [len(core.encode(text, add_special_tokens=False).ids) for text in texts]


@pytest.mark.parametrize("name", CUT)
@example([["the red  ", "the red \n", "the red \t"], ["the red \n \n", "the red \n  ", "the red \t \t "]])
@example([["red\n", "the red\n", "the red\t"], ["red\n  \n", "the red\n \n the", "the red\t \t \n"]])
@given(st.lists(st.lists(st.lists(st.sampled_from(PARTS), max_size=12).map("".join), max_size=6), max_size=4))
@settings(max_examples=50, deadline=None)
def test_counts_of_pieces_are_those_of_whole_texts(name: str, batches: list[list[str]]) -> None:
    core = trained(name)
    counter = TokenCounter(core)
    assert cuts_before_spaces(core)
    for texts in [*batches, *batches[::-1]]:  # pieces of all are known in the second round
        assert counter.counts(texts) == whole(core, texts)


@pytest.mark.parametrize("name", WHOLE)
def test_texts_of_other_tokenizers_are_counted_whole(name: str) -> None:
    core = trained(name)
    assert not cuts_before_spaces(core)
    texts = [*TRAINED_ON, "the red boat", "the  red", ""]
    assert TokenCounter(core).counts(texts * 2) == whole(core, texts * 2)


@pytest.mark.parametrize("token", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"content": "a b"}])
def test_added_tokens_that_reach_beyond_themselves_forbid_cuts(token: dict[str, str | bool]) -> None:
    core = Tokenizer.from_str(trained(QWEN).to_str())
    core.encode_special_tokens = True
    core.add_tokens([AddedToken(**({"content": "<box>", "normalized": False} | token))])
    assert not cuts_before_spaces(core)
    texts = ["the a b boat", "red <box> red", "red<box>", "a b"]
    assert TokenCounter(core).counts(texts * 2) == whole(core, texts * 2)


def test_other_normalizers_and_models_forbid_cuts() -> None:
    lower = Tokenizer.from_str(trained(QWEN).to_str())
    lower.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" r", "r")])
    dropping = Tokenizer.from_str(trained(QWEN).to_str())
    dropping.model.dropout = 0.5
    for core in (lower, dropping, Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))):
        assert not cuts_before_spaces(core)


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_counts, "KEPT_PIECES", 10)
    core = trained(QWEN)
    counter = TokenCounter(core)
    for number in range(0, 60, 3):
        texts = [f"the boat {own} is red" for own in range(number, number + 3)]
        assert counter.counts(texts) == whole(core, texts)
        assert len(counter._following) + len(counter._opening) <= 10 + 3 + 4
