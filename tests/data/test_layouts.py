"""Promise: shards are read as people have them, and what a layout leaves open is refused rather than guessed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_shards import Members, clip, picture, toy_resolution
from transformers import PreTrainedTokenizerFast

from data_tools.check import check_shard
from data_tools.shards import sample_key, write_shard
from keye_train.data.corpus import Corpus
from keye_train.data.formats import parse_sample
from keye_train.data.index import read_columns, tokenizer_fingerprint
from keye_train.data.indexing import build_index
from keye_train.data.opening import open_header
from keye_train.data.paths import find_shards
from keye_train.data.reader import ShardReader
from keye_train.model.chat import encode_conversation, first_answers, media_slots, parse_turns, text_sizes
from keye_train.sample import Sample, SampleError, SampleRef
from keye_train.settings import SourceSettings

REF = SampleRef("source", "shard.tar", "key")
JPEG = picture(30, 20)
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]


def members(described: Any = None, **media: bytes) -> Members:
    """A sample with media ``_0_jpg=...`` for the member ``0.jpg``."""
    found = {name.lstrip("_").replace("_", "."): data for name, data in media.items()}
    return found if described is None else found | {"json": json.dumps(described).encode()}


def flat(sample: Sample) -> list[str]:
    """The conversation as one list: ``role:``, texts, and names of media in < >."""
    found = []
    for message in sample.messages:
        found.append(message["role"] + ":")
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            value = part[part["type"]]
            found.append(value if part["type"] == "text" else f"<{value}>")
    return found


LAYOUTS: dict[str, tuple[Members, list[str], str]] = {
    "numbered images with one caption": (
        members(txt=b"two cats", _1_png=JPEG, _0_jpg=JPEG),
        ["user:", "<0.jpg>", "<1.png>", "assistant:", "two cats"],
        "caption",
    ),
    "video with caption": (members({"caption": "runs"}, mp4=b"v"), ["user:", "<mp4>", "assistant:", "runs"], "caption"),
    "LLaVA, path of the original file": (
        members({"id": 7, "image": "coco/train/7.jpg", "conversations": TURNS}, jpg=JPEG),
        ["user:", "<jpg>", "What?", "assistant:", "A cat."],
        "chat",
    ),
    "LLaVA without media": (
        members({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
        ["user:", "Hi", "assistant:", "Hello"],
        "chat",
    ),
    "messages with markers and lists": (
        members(
            {
                "messages": [
                    {"role": "user", "content": "<image> or <image>, and <video>?"},
                    {"role": "assistant", "content": "The first."},
                ],
                "images": ["b.jpg", "a.jpg"],
            },
            a_jpg=JPEG,
            b_jpg=JPEG,
            mp4=b"v",
        ),
        ["user:", "<b.jpg>", " or ", "<a.jpg>", ", and ", "<mp4>", "?", "assistant:", "The first."],
        "chat",
    ),
    "a text about markers is a text": (
        members({"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "A tag."}]}),
        ["user:", "<image>?", "assistant:", "A tag."],
        "chat",
    ),
    "OBELICS with URLs": (
        members(
            {"texts": ["one", None, "two", "three", None], "images": [None, "http://a/x.jpg", None, None, "http://b"]},
            _0_jpg=JPEG,
            _1_png=JPEG,
        ),
        ["assistant:", "one", "<0.jpg>", "two", "\n\nthree", "<1.png>"],
        "interleaved",
    ),
    "MMC4": (
        members(
            {
                "text_list": ["A.", "B."],
                "image_info": [
                    {"image_name": "x.jpg", "matched_text_index": 1},
                    {"image_name": "y.jpg", "matched_text_index": 0},
                ],
            },
            x_jpg=JPEG,
            y_jpg=JPEG,
        ),
        ["assistant:", "<y.jpg>", "A. ", "<x.jpg>", "B."],
        "interleaved",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_become_conversations(name: str) -> None:
    sample_members, expected, task = LAYOUTS[name]
    sample = parse_sample(REF, sample_members)
    assert (flat(sample), sample.task) == (expected, task)


@pytest.mark.parametrize(
    ("sample_members", "message"),
    [
        (members({"conversations": TURNS}), "1 markers <image> in the conversation for 0"),
        (members({"conversations": TURNS}, a_jpg=JPEG, b_jpg=JPEG), "have no order"),
        (members({"conversations": TURNS}, _0_jpg=JPEG, _1_jpg=JPEG), "1 markers <image> .* for 2"),
        (members({"conversations": [{"from": "wizard", "value": ""}]}), "wizard"),
        (members({"conversations": TURNS, "image": ["a", "b"]}, jpg=JPEG), "'image' names"),
        (members({"conversations": TURNS, "image": "../../etc/passwd.jpg"}), "'image' names"),
        (members({"texts": ["a"], "images": []}), "one length"),
        (members({"texts": ["a"], "images": ["0.jpg"]}, _0_jpg=JPEG), "exactly one"),
        (members({"texts": [None], "images": ["0.jpg"]}, _0_jpg=JPEG), "text is empty"),
        (members({"text_list": ["a"], "image_info": [{"image_name": "jpg"}]}, jpg=JPEG), "stands at sentence"),
        (members({"text_list": ["a"], "image_info": {}}), "no list of objects"),
    ],
)
def test_what_a_layout_leaves_open_is_refused(sample_members: Members, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        parse_sample(REF, sample_members)


def test_text_counts_of_many_conversations_are_those_of_each(tokenizer: PreTrainedTokenizerFast) -> None:
    conversations = [parse_sample(REF, sample_members).messages for sample_members, _, _ in LAYOUTS.values()]
    conversations += [[{"role": "system", "content": "be brief"}, *conversations[0]], conversations[2]]
    conversations += [[*conversations[2], *conversations[0], *conversations[2], {"role": "user", "content": "bye"}]]
    sizes = text_sizes(tokenizer, [parse_turns(messages) for messages in conversations])
    for messages, size in zip(conversations, sizes, strict=True):
        answers = sum(message["role"] == "assistant" for message in messages)
        assert len(size.cuts) == answers - (messages[-1]["role"] == "assistant")
        for number, (tokens, media) in enumerate([(size.tokens, len(media_slots(messages))), *size.cuts]):
            part = first_answers(messages, number)
            assert len(media_slots(part)) == media
            assert len(encode_conversation(tokenizer, part, [0] * media).input_ids) == tokens
    assert text_sizes(tokenizer, []) == []


def test_every_layout_passes_from_tar_to_plan(
    tmp_path: Path, make_shard: Callable[..., Path], tokenizer_dir: Path
) -> None:
    real = {"mp4": clip(64, 48, 8)}
    samples = [{name: real.get(name, data) for name, data in given.items()} for given, _, _ in LAYOUTS.values()]
    shard = make_shard(tmp_path / "a.tar", samples)
    assert read_columns(str(shard), ["error"])["error"].to_pylist() == [None] * len(samples)
    assert list(check_shard(str(shard), decode=True)) == []
    source = Corpus.open({"a": SourceSettings([str(shard)])}, tokenizer_dir, toy_resolution()).sources["a"]
    assert not source.errors
    assert (source.sizes.tokens > 0).all()


# ------------------------------------------------------------------------------------------------------- energon

QUESTION = {"q": "Which?", "a": ["x", "y"], "w": [0.3, 1.0], "options": ["cat", "dog"], "right": 1}
ENERGON: dict[str, tuple[dict[str, str], Members, list[str], str]] = {
    "CaptioningSample": (
        {"image": "jpg,png", "caption": "cap.txt"},
        members(png=JPEG, cap_txt=b" a cat\n"),
        ["user:", "<png>", "assistant:", "a cat"],
        "caption",
    ),
    "OCRSample": (
        {"image": "jpg", "text": "json[lines][0]"},
        members({"lines": ["STOP"]}, jpg=JPEG),
        ["user:", "<jpg>", "assistant:", "STOP"],
        "ocr",
    ),
    "TextSample": ({"text": "json[text]"}, members({"text": "hi"}), ["assistant:", "hi"], "text"),
    "VQASample": (
        {"image": "jpg", "context": "json[q]", "answers": "json[a]", "answer_weights": "json[w]"},
        members(QUESTION, jpg=JPEG),
        ["user:", "<jpg>", "Which?", "assistant:", "y"],
        "vqa",
    ),
    "VidQASample": (
        {"video": "mp4", "context": "json[q]", "answers": "json[a]"},
        members(QUESTION, mp4=b"v"),
        ["user:", "<mp4>", "Which?", "assistant:", "x"],
        "vqa",
    ),
    "MultiChoiceVQASample": (
        {"image": "jpg", "context": "json[q]", "choices": "json[options]", "correct_choice_idx": "json[right]"},
        members(QUESTION, jpg=JPEG),
        ["user:", "<jpg>", "Which?\nA. cat\nB. dog", "assistant:", "B"],
        "vqa",
    ),
    "InterleavedSample": (
        {"sequence": "json[seq]"},
        members({"seq": ["one", "0.jpg", "two"]}, _0_jpg=JPEG),
        ["assistant:", "one", "<0.jpg>", "two"],
        "interleaved",
    ),
    "SimilarityInterleavedSample": (
        {"images": "json[images]", "texts": "json[texts]", "matched_text_indices": "json[at]"},
        members({"images": ["0.jpg"], "texts": ["A.", "B."], "at": [1]}, _0_jpg=JPEG),
        ["assistant:", "A. ", "<0.jpg>", "B."],
        "interleaved",
    ),
}


def prepared(
    folder: Path, dataset: dict[str, Any], samples: list[Members], split: dict[str, Any] | None = None
) -> Path:
    """A folder as ``energon prepare`` leaves it; JSON is YAML."""
    meta = folder / ".nv-meta"
    meta.mkdir(parents=True)
    (meta / "dataset.yaml").write_text(json.dumps(dataset))
    (meta / "split.yaml").write_text(json.dumps(split or {"split_parts": {"train": ["shards/{0..1}.tar"], "val": []}}))
    for number in range(2):
        write_shard(folder / f"shards/{number}.tar", [(sample_key(n), given) for n, given in enumerate(samples)])
    return folder


@pytest.mark.parametrize("kind", ENERGON)
def test_folders_prepared_for_energon_are_read_as_they_are(
    tmp_path: Path, kind: str, tokenizer: PreTrainedTokenizerFast, tokenizer_dir: Path
) -> None:
    fields, sample_members, expected, task = ENERGON[kind]
    given = {name: clip(64, 48, 4) if name == "mp4" else data for name, data in sample_members.items()}
    dataset = {
        "sample_type": {"__module__": "megatron.energon", "__class__": kind},
        "field_map": fields,
        "part_filter": "sample_loader.py:part_filter",
    }
    folder = prepared(tmp_path / "set", dataset, [given])
    (folder / ".nv-meta/sample_loader.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    shards = find_shards([str(folder)])
    assert [Path(shard).name for shard in shards] == ["0.tar", "1.tar"]
    for shard in shards:
        build_index(shard, tokenizer, tokenizer_fingerprint(tokenizer_dir))
        assert read_columns(shard, ["error"])["error"].to_pylist() == [None]
        key, read = ShardReader().read(shard, 0)
        sample = parse_sample(SampleRef("", shard, key), read)
        assert (flat(sample), sample.task) == (expected, task)
        assert list(check_shard(shard)) == []
    assert not (tmp_path / "ran").exists()


def test_an_index_made_with_another_field_map_is_stale(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, tokenizer_dir: Path
) -> None:
    dataset = {"sample_type": {"__class__": "TextSample"}, "field_map": {"text": "txt"}}
    folder = prepared(tmp_path, dataset, [{"txt": b"a", "long.txt": b"abc"}])
    shard = str(folder / "shards/0.tar")
    build_index(shard, tokenizer, tokenizer_fingerprint(tokenizer_dir))
    open_header(shard, tokenizer_dir)
    (folder / ".nv-meta/dataset.yaml").write_text(json.dumps(dataset | {"field_map": {"text": "long.txt"}}))
    with pytest.raises(ValueError, match=r"dataset\.yaml of its folder was changed"):
        open_header(shard, tokenizer_dir)


def test_prepared_folders_that_need_more_are_refused_with_the_reason(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    kind = {"__class__": "TextSample"}
    for number, (dataset, message) in enumerate(
        [
            ({"sample_type": kind, "sample_loader": "sample_loader.py:f"}, "Python code, which is not run"),
            ({"sample_type": {"__class__": "AudioSample"}, "field_map": {"audio": "wav"}}, "AudioSample; known are"),
        ]
    ):
        folder = prepared(tmp_path / str(number), dataset, [{"txt": b"a"}])
        with pytest.raises(ValueError, match=message):
            build_index(folder / "shards/0.tar", tokenizer, "any")
    folder = prepared(tmp_path / "tag", {}, [{"txt": b"a"}])
    (folder / ".nv-meta/dataset.yaml").write_text("!!python/object/apply:os.system ['touch ran']")
    with pytest.raises(ValueError, match="not valid YAML"):
        build_index(folder / "shards/0.tar", tokenizer, "any")
    for number, split in enumerate(
        [{"split_parts": {"val": []}}, {"split_parts": {"train": ["../x.tar"]}}, {"split_parts": {"train": 3}}]
    ):
        folder = prepared(tmp_path / f"split{number}", {}, [], split)
        with pytest.raises(ValueError, match=r"split\.yaml"):
            find_shards([str(folder)])
    whole = prepared(tmp_path / "crude", {"__class__": "CrudeWebdataset"}, [{"txt": b"a"}])
    assert build_index(whole / "shards/0.tar", tokenizer, "any").rows == 1
    with pytest.raises(ValueError, match="is a folder without"):
        find_shards([str(tmp_path)])
