"""Promises: a sample becomes consistent tensors; faults of data are SampleErrors, faults of settings SettingsErrors."""

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch
from toy_inputs import flat_frames, image_bytes, synthetic_image, toy_model_settings, toy_tokenizer, video_bytes

from keye_train.model.chat import text_token_count
from keye_train.model.images import probe_image
from keye_train.model.packed import IGNORE_INDEX, PackedInputs, VisionInputs
from keye_train.model.positions import grid_tokens, media_grid, rope_index, video_seconds_per_grid
from keye_train.model.sample_encoder import SampleEncoder
from keye_train.model.video import probe_video
from keye_train.sample import Sample, SampleError, SampleRef
from keye_train.settings import ModelSettings, ResolutionSettings, SettingsError

RESOLUTION = ResolutionSettings(
    image_min_tokens=1, image_max_tokens=12, video_frame_min_tokens=1, video_frame_max_tokens=4, video_max_tokens=32
)
IMAGE = image_bytes(synthetic_image(60, 100))
VIDEO = video_bytes(flat_frames(24))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    return toy_model_settings(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def encoder(model: ModelSettings) -> SampleEncoder:
    return SampleEncoder.from_settings(model, RESOLUTION)


def sample(content: object, answer: str | None = "red", **media: bytes) -> Sample:
    messages = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return Sample(SampleRef("toy", "toy.tar", "0"), messages, media, task="colour")


def mixed_sample() -> Sample:
    content = [
        {"type": "video", "video": "clip"},
        {"type": "text", "text": "and"},
        {"type": "image", "image": "photo"},
        {"type": "text", "text": "colour?"},
    ]
    return sample(content, clip=VIDEO, photo=IMAGE)


def test_an_interleaved_sample_becomes_consistent_tensors(encoder: SampleEncoder, model: ModelSettings) -> None:
    encoded = encoder.encode(mixed_sample())
    infos = [probe_video(VIDEO), probe_image(IMAGE)]
    grids = [media_grid(info, RESOLUTION) for info in infos]
    assert (encoded.ref.key, encoded.task) == ("0", "colour")
    assert encoded.grid_thw.tolist() == [list(grid) for grid in grids]
    foretold = text_token_count(encoder.tokenizer, mixed_sample().messages) + sum(map(grid_tokens, grids))
    assert len(encoded.input_ids) == len(encoded.labels) == foretold
    assert encoded.pixel_patches.shape == (4 * sum(map(grid_tokens, grids)), 3, 14, 14)
    assert encoded.pixel_patches.dtype == torch.uint8
    ids = model.special_tokens
    positions, _ = rope_index(
        encoded.input_ids[None],
        None,
        encoded.grid_thw[1:],
        encoded.grid_thw[:1],
        torch.tensor([video_seconds_per_grid(infos[0], RESOLUTION)]),
        vision_start_id=ids.vision_start,
        image_pad_id=ids.image_pad,
        video_pad_id=ids.video_pad,
    )
    assert torch.equal(encoded.position_ids, positions[:, 0])
    pack = PackedInputs.build(
        encoded.input_ids,
        encoded.labels,
        encoded.position_ids,
        [len(encoded.input_ids)],
        VisionInputs.build(encoded.pixel_patches, encoded.grid_thw),
        (ids.image_pad, ids.video_pad),
    )
    assert toy_tokenizer().decode(pack.loss_targets) == "red<|im_end|>"


def test_text_alone_has_empty_vision(encoder: SampleEncoder) -> None:
    encoded = encoder.encode(sample("colour?"))
    assert encoded.pixel_patches.shape == (0, 3, 14, 14)
    assert encoded.grid_thw.shape == (0, 3)
    assert torch.equal(encoded.position_ids, torch.arange(len(encoded.input_ids)).expand(3, -1))


def test_a_prompt_ends_where_the_answer_begins(encoder: SampleEncoder) -> None:
    whole, prompt = encoder.encode(mixed_sample()), encoder.encode_prompt(mixed_sample())
    length = len(prompt.input_ids)
    assert torch.equal(prompt.input_ids, whole.input_ids[:length])
    assert torch.equal(prompt.position_ids, whole.position_ids[:, :length])
    assert torch.equal(prompt.pixel_patches, whole.pixel_patches)
    assert whole.labels[length] != IGNORE_INDEX
    assert (prompt.labels == IGNORE_INDEX).all()


def test_a_prompt_without_an_answer_is_the_whole_conversation(encoder: SampleEncoder) -> None:
    bare = encoder.encode_prompt(sample("colour?", answer=None))
    assert torch.equal(bare.input_ids, encoder.encode_prompt(sample("colour?")).input_ids)


def test_a_pair_is_one_image_and_its_padded_caption(encoder: SampleEncoder, model: ModelSettings) -> None:
    pair = encoder.encode_pair(sample([{"type": "image", "image": "0.png"}], "a red <|image_pad|>", **{"0.png": IMAGE}))
    assert len(pair.pixel_patches) == int(pair.grid_thw.prod())
    assert pair.text_ids.shape == (model.text_tower.max_tokens,)
    assert model.special_tokens.image_pad not in pair.text_ids.tolist()
    short = encoder.encode_pair(sample([{"type": "image", "image": "0.png"}], "a", **{"0.png": IMAGE}))
    assert short.text_ids[1:].tolist() == [model.special_tokens.pad] * (model.text_tower.max_tokens - 1)


@pytest.mark.parametrize(
    ("content", "media"),
    [
        ("no image", {}),
        ([{"type": "image", "image": "a"}] * 2, {"a": IMAGE}),
        ([{"type": "video", "video": "a"}], {"a": VIDEO}),
    ],
)
def test_a_pair_needs_exactly_one_image(encoder: SampleEncoder, content: object, media: dict[str, bytes]) -> None:
    with pytest.raises(SampleError, match="exactly one image"):
        encoder.encode_pair(sample(content, **media))


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (sample([{"type": "image", "image": "a"}]), "not in the shard"),
        (sample([{"type": "image", "image": "a"}], a=b"garbage"), "broken image"),
        (sample([{"type": "video", "video": "a"}], a=VIDEO[:900]), "broken video"),
        (sample([{"type": "image", "image": "a"}], a=image_bytes(synthetic_image(2, 500))), "aspect ratio"),
        (sample("what?", answer=None), "without an assistant turn"),
        (sample(None), "content"),
    ],
)
def test_broken_samples_are_sample_errors_with_the_reason(encoder: SampleEncoder, broken: Sample, reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        encoder.encode(broken)


def test_a_processor_travels_to_worker_processes(encoder: SampleEncoder) -> None:
    copy = pickle.loads(pickle.dumps(encoder))
    assert torch.equal(copy.encode(mixed_sample()).input_ids, encoder.encode(mixed_sample()).input_ids)


def test_a_special_token_that_disagrees_names_the_setting_and_the_fix(model: ModelSettings) -> None:
    wrong = dataclasses.replace(model.special_tokens, image_pad=0)
    right = model.special_tokens.image_pad
    with pytest.raises(SettingsError, match=f"set model.special_tokens.image_pad={right}"):
        SampleEncoder.from_settings(dataclasses.replace(model, special_tokens=wrong), RESOLUTION)


def test_a_vocabulary_that_is_too_small_is_refused(model: ModelSettings) -> None:
    language = dataclasses.replace(model.language, vocab_size=100)
    with pytest.raises(SettingsError, match=r"language\.vocab_size=100"):
        SampleEncoder.from_settings(dataclasses.replace(model, language=language), RESOLUTION)
    text = dataclasses.replace(model.text_tower, vocab_size=100)
    encoder = SampleEncoder.from_settings(dataclasses.replace(model, text_tower=text), RESOLUTION)
    with pytest.raises(SettingsError, match=r"text_tower\.vocab_size=100"):
        _ = encoder.text_tokenizer


def test_a_folder_without_a_tokenizer_is_refused(model: ModelSettings, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"model\.tokenizer=.*no tokenizer"):
        SampleEncoder.from_settings(dataclasses.replace(model, tokenizer=str(tmp_path)), RESOLUTION)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(SettingsError, match="cannot be loaded"):
        SampleEncoder.from_settings(dataclasses.replace(model, tokenizer=str(tmp_path)), RESOLUTION)
