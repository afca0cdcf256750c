"""The demo's tokenizer: byte-level BPE in the manner of Qwen, trained on the demo's texts; Keye's tokens first."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from keye_train.runs import write_json_atomic, write_text_atomic

MAX_VOCABULARY = 1500
# Their place is their id. True: a control token, left out of decoded text; False: a word of the language.
SPECIAL_TOKENS: dict[str, bool] = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<|object_ref_start|>": False,
    "<|object_ref_end|>": False,
    "<|box_start|>": False,
    "<|box_end|>": False,
    "<|quad_start|>": False,
    "<|quad_end|>": False,
    "<|vision_start|>": True,
    "<|vision_end|>": True,
    "<|vision_pad|>": True,
    "<|image_pad|>": True,
    "<|video_pad|>": True,
    "<|point_start|>": False,
    "<|point_end|>": False,
    "<|ocr_text_start|>": False,
    "<|ocr_text_end|>": False,
    "<|clip_time_start|>": False,
    "<|clip_time_end|>": False,
    "<think>": False,
    "</think>": False,
}
# Where words end, as in the published tokenizer: English clitics, letters with one leading sign, single digits,
# other signs, line breaks, blanks. No merge crosses these borders.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The words that every conversation has around its content.
SCAFFOLD = ("system\nYou are a helpful assistant.", "user\n", "assistant\n", "\n")


def conversation_texts(messages: Iterable[dict[str, Any]]) -> list[str]:
    """What a conversation gives the tokenizer to read: its texts, cut at special tokens, and the scaffold."""
    texts = list(SCAFFOLD)
    for message in messages:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
        for part in parts:
            for token in SPECIAL_TOKENS:
                part = part.replace(token, "\0")
            texts += [piece for piece in part.split("\0") if piece]
    return texts


def train_tokenizer(texts: Iterable[str], out: Path) -> int:
    """Train on ``texts``, write ``out``/tokenizer.json and tokenizer_config.json, and give the number of entries.

    The same texts give the same bytes. Fewer than MAX_VOCABULARY entries result where no pair of tokens is left that
    occurs twice.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    described = json.loads(tokenizer.to_str())
    for token in described["added_tokens"]:
        token["special"] = SPECIAL_TOKENS[token["content"]]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 8192,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    write_json_atomic(out / "tokenizer_config.json", config)
    write_text_atomic(out / "tokenizer.json", json.dumps(described, ensure_ascii=False) + "\n")
    return tokenizer.get_vocab_size()
