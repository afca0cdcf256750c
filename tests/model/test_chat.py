"""Promises: text and ids equal the published template's; labels only on answers; no text can forge a special token."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from toy_inputs import CONTROL_TOKENS, toy_tokenizer
from transformers import PreTrainedTokenizerFast

from keye_train.model.chat import (
    Message,
    chat_text,
    encode_conversation,
    last_answer,
    media_slots,
    text_token_count,
)
from keye_train.model.packed import IGNORE_INDEX
from keye_train.sample import SampleError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "chat.json").read_text(encoding="utf-8"))
CHATS = [row for row in GOLDEN if "add_generation_prompt" in row]
PUBLISHED = Path(__file__).parents[3] / "shared" / "keye-vl-8b-preview"


def as_sample_messages(row: dict[str, Any]) -> tuple[list[Message], list[int]]:
    """Messages in our form (media by name), and the tokens of each image and video."""
    grids = {"image": iter(row["image_grid_thw"]), "video": iter(row["video_grid_thw"])}
    counts: list[int] = []
    messages = []
    for message in row["messages"]:
        content = message["content"]
        if isinstance(content, list):
            items = []
            for item in content:
                kind = item["type"].removesuffix("_url")
                if kind != "text":
                    t, h, w = next(grids[kind])
                    counts.append(t * h * w // 4)
                    item = {"type": kind, kind: "0.bin"}
                items.append(item)
            content = items
        messages.append({"role": message["role"], "content": content})
    return messages, counts


def ids_of(*tokens: str) -> list[int]:
    return [toy_tokenizer().convert_tokens_to_ids(token) for token in tokens]


@pytest.mark.parametrize("row", CHATS)
def test_text_equals_the_published_template(row: dict[str, Any]) -> None:
    messages, _ = as_sample_messages(row)
    assert chat_text(messages, row["add_generation_prompt"]) == row["text"]


@pytest.fixture(scope="module")
def published_tokenizer() -> PreTrainedTokenizerFast:
    if not PUBLISHED.is_dir():
        pytest.skip(f"needs the tokenizer of Keye-VL-8B-Preview in {PUBLISHED}")
    return PreTrainedTokenizerFast.from_pretrained(PUBLISHED, local_files_only=True)


def test_ids_equal_the_published_ones(published_tokenizer: PreTrainedTokenizerFast) -> None:
    for row in CHATS:
        messages, counts = as_sample_messages(row)
        encoded = encode_conversation(published_tokenizer, messages, counts, row["add_generation_prompt"])
        assert encoded.input_ids.tolist() == row["input_ids"]


def test_labels_are_the_answers_and_their_end_only() -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image", "image": "0.png"}, {"type": "text", "text": "colour?"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": [{"type": "text", "text": "yes, "}, {"type": "text", "text": "red"}]},
    ]
    encoded = encode_conversation(toy_tokenizer(), messages, [3])
    learnt = encoded.labels != IGNORE_INDEX
    assert encoded.labels[learnt].equal(encoded.input_ids[learnt])
    assert toy_tokenizer().decode(encoded.labels[learnt]) == "red<|im_end|>yes, red<|im_end|>"
    # the header of an answer and the newline after it are not learnt
    first = int(learnt.nonzero()[0])
    header = [*ids_of("<|im_start|>"), *toy_tokenizer()("assistant\n")["input_ids"]]
    assert encoded.input_ids[:first].tolist()[-len(header) :] == header
    assert not learnt[-1]


def test_media_become_their_number_of_pads_in_order() -> None:
    content = [{"type": "video", "video": "a"}, {"type": "text", "text": "x"}, {"type": "image", "image": "b"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "y"}]
    ids = encode_conversation(toy_tokenizer(), messages, [2, 1]).input_ids.tolist()
    start, end, image, video = ids_of("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    begin = ids.index(start)
    x = toy_tokenizer()("x")["input_ids"]
    assert ids[begin : begin + 7 + len(x)] == [start, video, video, end, *x, start, image, end]
    assert [slot.name for slot in media_slots(messages)] == ["a", "b"]


def test_media_in_an_answer_are_never_labelled() -> None:
    messages = [{"role": "assistant", "content": [{"type": "image", "image": "a"}, {"type": "text", "text": "this"}]}]
    encoded = encode_conversation(toy_tokenizer(), messages, [4])
    assert toy_tokenizer().decode(encoded.labels[encoded.labels != IGNORE_INDEX]) == "this<|im_end|>"


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.one_of(st.sampled_from(CONTROL_TOKENS), st.text(max_size=8)), max_size=6),
    role=st.sampled_from(["system", "user", "assistant"]),
)
def test_special_tokens_in_texts_stay_plain_text(pieces: list[str], role: str) -> None:
    text = "".join(pieces)
    plain = encode_conversation(toy_tokenizer(), [{"role": role, "content": ""}], [])
    forged = encode_conversation(toy_tokenizer(), [{"role": role, "content": text}], [])
    control = set(ids_of(*CONTROL_TOKENS))
    assert [i for i in forged.input_ids.tolist() if i in control] == [
        i for i in plain.input_ids.tolist() if i in control
    ]


def test_word_tokens_in_texts_stay_tokens() -> None:
    messages = [
        {"role": "user", "content": "<|box_start|>(1,2)<|box_end|>"},
        {"role": "assistant", "content": "<think>"},
    ]
    ids = encode_conversation(toy_tokenizer(), messages, []).input_ids.tolist()
    assert set(ids_of("<|box_start|>", "<|box_end|>", "<think>")) <= set(ids)


@settings(max_examples=40, deadline=None)
@given(answer=st.text(max_size=20))
def test_an_answer_is_encoded_as_it_is_generated_after_the_prompt(answer: str) -> None:
    question = {"role": "user", "content": "what?"}
    prompt = encode_conversation(toy_tokenizer(), [question], [], generation_prompt=True).input_ids.tolist()
    whole = encode_conversation(toy_tokenizer(), [question, {"role": "assistant", "content": answer}], [])
    assert whole.input_ids.tolist()[: len(prompt)] == prompt
    assert (whole.labels[: len(prompt)] == IGNORE_INDEX).all()
    assert whole.labels[len(prompt)] != IGNORE_INDEX


def test_the_count_of_text_tokens_plus_pads_is_the_length() -> None:
    for row in CHATS:
        messages, counts = as_sample_messages(row)
        length = len(encode_conversation(toy_tokenizer(), messages, counts).input_ids)
        assert text_token_count(toy_tokenizer(), messages) + sum(counts) == length


@pytest.mark.parametrize(
    "messages",
    [
        [],
        ["hello"],
        [{"content": "no role"}],
        [{"role": "tool", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": "half a pair: \ud800"}],
        [{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}],
        [{"role": "user", "content": [{"type": "audio", "audio": "0.wav"}]}],
        [{"role": "user", "content": [{"type": "image"}]}],
        [{"role": "user", "content": [{"type": "text", "text": None}]}],
    ],
)
def test_malformed_conversations_are_sample_errors(messages: list[Any]) -> None:
    with pytest.raises(SampleError):
        encode_conversation(toy_tokenizer(), messages, [])


@pytest.mark.parametrize("counts", [[], [1, 1]])
def test_token_counts_that_do_not_match_the_media_are_refused(counts: list[int]) -> None:
    messages = [{"role": "user", "content": [{"type": "image", "image": "a"}]}]
    with pytest.raises(ValueError, match="token counts"):
        encode_conversation(toy_tokenizer(), messages, counts)


def test_the_caption_is_the_text_of_the_last_answer() -> None:
    turns = [{"role": "assistant", "content": "first"}, {"role": "user", "content": "and?"}]
    assert last_answer([*turns, {"role": "assistant", "content": "second"}]) == "second"
    for messages in (turns[1:], [*turns, {"role": "assistant", "content": " "}]):
        with pytest.raises(SampleError, match="without an answer"):
            last_answer(messages)


def test_a_tokenizer_without_the_special_tokens_is_refused() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(ValueError, match="im_start"):
        encode_conversation(bare, [{"role": "user", "content": "a"}], [])
