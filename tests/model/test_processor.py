"""Promises: the processor is a transformers processor; it takes media in every form; training and it read alike."""

from __future__ import annotations

import base64
import http.server
import pickle
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy_inputs import flat_frames, image_bytes, synthetic_image, toy_model_settings, toy_tokenizer, video_bytes

from keye_train.model import IGNORE_INDEX, KeyeImageProcessor, KeyeProcessor
from keye_train.model.media import read_video
from keye_train.model.sample_encoder import SampleEncoder
from keye_train.model.video_torchcodec import checked_backend
from keye_train.sample import Sample, SampleError, SampleRef
from keye_train.settings import ResolutionSettings, VideoBackend

SMALL = ResolutionSettings(
    image_min_tokens=1, image_max_tokens=12, video_frame_min_tokens=1, video_frame_max_tokens=4, video_max_tokens=32
)
PICTURE = synthetic_image(60, 100)
IMAGE, VIDEO = image_bytes(PICTURE), video_bytes(flat_frames(24))


@pytest.fixture(scope="module")
def processor() -> KeyeProcessor:
    return KeyeProcessor.from_resolution(toy_tokenizer(), SMALL)


def user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def image(source: Any = IMAGE, **options: Any) -> dict[str, Any]:
    return {"type": "image", "image": source, **options}


def video(source: Any = VIDEO, **options: Any) -> dict[str, Any]:
    return {"type": "video", "video": source, **options}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def encode(processor: KeyeProcessor, messages: Any, **options: Any) -> Any:
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)


def test_it_gives_the_tensors_that_training_reads(processor: KeyeProcessor, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "red"}
    messages = [*user(video(), text("and"), image(), text("colour? <|image_pad|>")), answer]
    batch = encode(processor, messages, return_labels=True, return_position_ids=True)
    content = [{"type": "video", "video": "v"}, text("and"), {"type": "image", "image": "i"}]
    stored = [{"role": "user", "content": [*content, text("colour? <|image_pad|>")]}, answer]
    sample = Sample(SampleRef("toy", "toy.tar", "0"), stored, {"v": VIDEO, "i": IMAGE})
    trained = SampleEncoder.from_settings(toy_model_settings(tmp_path), SMALL).encode(sample)
    assert torch.equal(batch["input_ids"][0], trained.input_ids)
    assert torch.equal(batch["labels"][0], trained.labels)
    assert torch.equal(batch["position_ids"][:, 0], trained.position_ids)
    assert torch.cat([batch["video_grid_thw"], batch["image_grid_thw"]]).equal(trained.grid_thw)
    pixels = torch.cat([batch["pixel_values_videos"], batch["pixel_values"]])
    assert ((pixels + 1) * 127.5).round().to(torch.uint8).equal(trained.pixel_patches)
    assert processor.count_tokens(messages) == len(trained.input_ids)


def test_text_and_message_ways_agree(processor: KeyeProcessor) -> None:
    messages = user(image(), video(), text("which?"))
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    by_text = processor(text=rendered, images=[IMAGE], videos=[VIDEO], return_position_ids=True)
    by_message = encode(processor, messages, add_generation_prompt=True, return_position_ids=True)
    assert set(by_text) == set(by_message)
    for name, values in by_message.items():
        assert by_text[name].equal(values), name
    assert by_message["rope_deltas"].shape == (1, 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_holds_each_conversation_as_alone(processor: KeyeProcessor, side: str) -> None:
    batch = [[*user(image(), text("a")), {"role": "assistant", "content": "b"}], user(video(), text("much longer"))]
    processor.tokenizer.padding_side = side
    try:
        together = encode(processor, batch, return_labels=True, return_position_ids=True)
    finally:
        processor.tokenizer.padding_side = "right"
    for row, messages in enumerate(batch):
        alone = encode(processor, messages, return_labels=True, return_position_ids=True)
        valid = together["attention_mask"][row].bool()
        assert together["input_ids"][row][valid].equal(alone["input_ids"][0])
        assert together["labels"][row][valid].equal(alone["labels"][0])
        assert (together["labels"][row][~valid] == IGNORE_INDEX).all()
        assert together["position_ids"][:, row, valid].equal(alone["position_ids"][:, 0])


@pytest.mark.parametrize("published", [False, True])
def test_padding_of_a_call_is_the_tokenizers(processor: KeyeProcessor, published: bool) -> None:
    batch = [user(image(), text("a")), user(text("much longer" * 20))]
    plain = encode(processor, batch, published=published)
    options: dict[str, Any] = {"padding_side": "left", "pad_to_multiple_of": 64, "truncation": False, "tools": None}
    for given in (options, {"processor_kwargs": {"padding_side": "left", "pad_to_multiple_of": 64}}):
        left = encode(processor, batch, published=published, **given)
        assert left["input_ids"].shape[1] % 64 == 0
        for row in range(2):
            valid = left["attention_mask"][row].bool()
            assert valid[-1]
            assert left["input_ids"][row][valid].equal(plain["input_ids"][row][plain["attention_mask"][row].bool()])
    filled = encode(processor, batch, published=published, padding="max_length", max_length=500)
    assert filled["input_ids"].shape == (2, 500)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"truncation": True}, "truncation would cut"),
        ({"processor_kwargs": {"truncation": True}}, "truncation would cut"),
        ({"max_length": 5}, "max_length=5"),
        ({"padding": "max_length", "max_length": 5}, "above max_length=5"),
        ({"max_pixel": 5}, "unknown max_pixel"),
        ({"images": [IMAGE]}, "unknown images"),
        ({"tools": [{}]}, "unknown tools"),
    ],
)
def test_options_of_a_call_are_never_dropped(processor: KeyeProcessor, options: dict[str, Any], reason: str) -> None:
    for published in (False, True):
        with pytest.raises(ValueError, match=reason):
            encode(processor, user(image()), published=published, **options)


def test_a_template_of_its_own_may_have_variables(processor: KeyeProcessor) -> None:
    template = "{{ mood }}" + processor.chat_template
    other = KeyeProcessor(processor.image_processor, toy_tokenizer(), chat_template=template)
    assert encode(other, user(text("a")), mood="")["input_ids"].equal(encode(other, user(text("a")))["input_ids"])
    with pytest.raises(ValueError, match="unknown moods"):
        encode(other, user(text("a")), moods="")


def test_it_is_saved_and_loaded_with_everything(processor: KeyeProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    expected = {"preprocessor_config.json", "processor_config.json", "chat_template.json", "tokenizer.json"}
    assert names >= expected
    loaded = KeyeProcessor.from_pretrained(tmp_path)
    assert loaded.resolution == processor.resolution == SMALL
    assert loaded.chat_template == processor.chat_template
    messages = user(image(), video(), text("which?"))
    for name, values in encode(processor, messages).items():
        assert encode(loaded, messages)[name].equal(values), name


def test_options_of_loading_reach_the_part_that_they_are_for(processor: KeyeProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    loaded = KeyeProcessor.from_pretrained(
        tmp_path, max_pixels=4 * 784, use_fast=True, padding_side="left", video={"fps": 1.0}, video_backend="auto"
    )
    assert loaded.image_processor.max_pixels == 4 * 784
    assert loaded.image_processor.min_pixels == processor.image_processor.min_pixels
    assert loaded.tokenizer.padding_side == "left"
    assert not {"max_pixels", "video", "video_backend"} & set(loaded.tokenizer.init_kwargs)
    assert loaded.video == {**processor.video, "fps": 1.0}
    assert loaded.backend == checked_backend(VideoBackend.auto)
    grid = encode(loaded, user(image(synthetic_image(280, 280))))["image_grid_thw"]
    assert int(grid.prod()) == 16
    assert KeyeImageProcessor.from_pretrained(tmp_path, max_pixels=4 * 784).max_pixels == 4 * 784
    template = KeyeProcessor.from_pretrained(tmp_path, chat_template="{{ messages }}")
    assert template.chat_template == "{{ messages }}"
    assert template.tokenizer.chat_template == processor.tokenizer.chat_template
    for option in ({"max_pixels": 1}, {"patch_size": 16}, {"video": {"rate": 1}}, {"video_backend": "none"}):
        with pytest.raises(ValueError, match=r"max_pixels=1|patch_size=16|rate|'none'"):
            KeyeProcessor.from_pretrained(tmp_path, **option)


def test_values_that_the_model_was_not_made_for_are_refused() -> None:
    for wrong in ({"patch_size": 16}, {"merge_size": 1}, {"image_mean": [0.48, 0.46, 0.41]}, {"min_pixels": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            KeyeImageProcessor(**wrong)
    with pytest.raises(ValueError, match="unknown rate"):
        KeyeProcessor(tokenizer=toy_tokenizer(), video={"rate": 2})


def test_a_picture_is_the_same_from_every_source(processor: KeyeProcessor, tmp_path: Path) -> None:
    path = tmp_path / "a picture.png"
    path.write_bytes(IMAGE)
    reference = processor.image_processor([IMAGE])["pixel_values"]
    sources = [
        str(path),
        path,
        path.as_uri(),
        "data:image/png;base64," + base64.b64encode(IMAGE).decode(),
        Image.open(path),
        PICTURE,
        np.moveaxis(PICTURE, 2, 0),
        torch.from_numpy(PICTURE).permute(2, 0, 1),
        PICTURE.astype(np.float32),
        PICTURE / 255,
    ]
    for source in sources:
        assert processor.image_processor(source)["pixel_values"].equal(reference), type(source)
        forms = [image(source), {"image_url": {"url": source}}, {"type": "image", "url": source}]
        for form in forms:
            assert encode(processor, user(form))["pixel_values"].equal(reference), form


def test_a_video_is_the_same_from_every_source(processor: KeyeProcessor, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(VIDEO)
    reference = encode(processor, user(video()))
    uri = "data:video/mp4;base64," + base64.b64encode(VIDEO).decode()
    for source in (str(path), path, path.as_uri(), uri):
        assert encode(processor, user(video(source)))["pixel_values_videos"].equal(reference["pixel_values_videos"])
    frames = flat_frames(6)
    folder = [tmp_path / f"{number}.png" for number in range(len(frames))]
    for frame, name in zip(frames, folder, strict=True):
        Image.fromarray(frame).save(name)
    given = [
        encode(processor, user(video(source, fps=3))) for source in (frames, np.stack(frames), list(map(str, folder)))
    ]
    given.append(processor(text=processor.apply_chat_template(user(video())), videos=[frames], fps=[3.0]))
    for batch in given:
        assert batch["pixel_values_videos"].equal(given[0]["pixel_values_videos"])
        assert batch["video_grid_thw"][0, 0] == 6
        assert batch["second_per_grid_ts"].tolist() == pytest.approx([1 / 3])


def test_float_frames_have_one_range() -> None:
    levels = np.stack([np.full((8, 8, 3), level, dtype=np.float32) for level in (0, 1, 200)])
    channels_first = torch.from_numpy(np.moveaxis(levels, 3, 1))
    for source in (levels, list(levels), channels_first):
        assert [frame.getpixel((0, 0))[0] for frame in read_video(source)] == [0, 1, 200], type(source)
    assert [frame.getpixel((0, 0))[0] for frame in read_video(levels / 200)] == [0, 1, 255]
    with pytest.raises(SampleError, match="values from nan"):
        read_video(np.full((2, 8, 8, 3), np.nan))


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "a.png").write_bytes(IMAGE)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(tmp_path))

        def do_GET(self) -> None:
            if not self.path.startswith("/to?"):
                return super().do_GET()
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to?"))
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_network_is_used_only_when_allowed(processor: KeyeProcessor, web: str) -> None:
    with pytest.raises(SampleError, match="allow_http"):
        encode(processor, user(image(f"{web}/a.png")))
    fetched = encode(processor, user(image(f"{web}/a.png")), allow_http=True)
    assert fetched["pixel_values"].equal(processor.image_processor(IMAGE)["pixel_values"])
    with pytest.raises(SampleError, match="cannot be fetched"):
        encode(processor, user(image(f"{web}/b.png")), allow_http=True)
    with pytest.raises(SampleError, match="cannot be fetched"):
        encode(processor, user(image(f"{web}/a picture.png")), allow_http=True)


def test_only_redirects_to_the_web_are_followed(
    processor: KeyeProcessor, web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = encode(processor, user(image(f"{web}/to?{web}/a.png")), allow_http=True)
    assert fetched["pixel_values"].equal(processor.image_processor(IMAGE)["pixel_values"])
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.setblocking(False)
        port = other.getsockname()[1]
        monkeypatch.setenv("ftp_proxy", f"http://127.0.0.1:{port}")
        for target in (f"ftp://127.0.0.1:{port}/a.png", (tmp_path / "a.png").as_uri(), "data:image/png;base64,AAAA"):
            with pytest.raises(SampleError, match="cannot be fetched"):
                encode(processor, user(image(f"{web}/to?{target}")), allow_http=True)
        with pytest.raises(BlockingIOError):  # nobody has called
            other.accept()


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (image("no/such/file.png"), "not a file"),
        (image("x" * 5000), "not a file"),
        (image("file://elsewhere/a.png"), "another machine"),
        (image("data:image/png,abc"), "base64"),
        (image("data:image/png;base64,@@@"), "not base64"),
        (image(b"garbage"), "broken image"),
        (image(3), "type int"),
        (image(np.zeros((5, 5, 7))), "shape"),
        (image(np.full((5, 5), 300)), "values from"),
        (image(np.full((5, 5), np.nan)), "values from"),
        ({"type": "image"}, "without a source"),
        (image(max_pixels=-1), "max_pixels"),
        (image(fps=2), "one of videos"),
        (image(min_pixels=7840, max_pixels=784), "min_pixels=7840"),
        (image(resized_height=28), "together"),
        (video([]), "empty list"),
        (video([PICTURE, PICTURE[:30]], fps=1), "one size"),
        (video(fps=1, nframes=4), "exclude"),
        (video(video_start=1.0, video_end=1.0), "holds no frames"),
        (video(nframes=40), "above the 32 tokens"),
    ],
)
def test_what_is_wrong_with_a_medium_is_said(processor: KeyeProcessor, item: dict[str, Any], reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        encode(processor, user(item))


def test_the_last_turn_can_be_left_open(processor: KeyeProcessor) -> None:
    messages = [*user(text("colour?")), {"role": "assistant", "content": "The square is"}]
    batch = encode(processor, messages, continue_final_message=True)
    assert processor.tokenizer.decode(batch["input_ids"][0]).endswith("The square is")
    assert processor.apply_chat_template(messages, continue_final_message=True).endswith("The square is")


def test_another_template_is_never_ignored(processor: KeyeProcessor) -> None:
    other = KeyeProcessor(processor.image_processor, toy_tokenizer(), chat_template="{{ messages[0]['content'] }}")
    assert other.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi"
    with pytest.raises(ValueError, match="not Keye's"):
        encode(other, [{"role": "user", "content": "hi"}])


def test_options_of_a_call_are_for_media_without_their_own(processor: KeyeProcessor) -> None:
    large = synthetic_image(280, 280)
    messages = user(image(large), image(large, max_pixels=9 * 784), video(nframes=3))
    for batch in (
        encode(processor, messages, max_pixels=4 * 784, fps=8.0),
        encode(processor, messages, processor_kwargs={"max_pixels": 4 * 784, "fps": 8.0}),
    ):
        assert batch["image_grid_thw"].prod(dim=1).tolist() == [16, 36]
        assert batch["video_grid_thw"][0, 0] == 3
    assert processor.count_tokens(messages, max_pixels=4 * 784) == batch["input_ids"].shape[1]
    rendered = processor.apply_chat_template(user(image(large), video()))
    called = processor(
        text=rendered,
        images=[large],
        videos=[VIDEO],
        images_kwargs={"max_pixels": 4 * 784},
        videos_kwargs={"nframes": 3},
    )
    assert (int(called["image_grid_thw"].prod()), int(called["video_grid_thw"][0, 0])) == (16, 3)
    with pytest.raises(SampleError, match="unknown option size"):
        encode(processor, messages, processor_kwargs={"size": 3})


def test_it_travels_to_worker_processes(processor: KeyeProcessor) -> None:
    messages = user(image(), video(), text("which?"))
    copy = pickle.loads(pickle.dumps(processor))
    assert encode(copy, messages)["pixel_values"].equal(encode(processor, messages)["pixel_values"])


def test_what_it_names_is_what_it_returns(processor: KeyeProcessor) -> None:
    batch = encode(processor, user(image(), video()))
    assert set(batch) == set(processor.model_input_names) - {"token_type_ids"}
    planned = processor._get_num_multimodal_tokens([(60, 100)])
    assert planned.num_image_patches == [len(batch["pixel_values"])]
    assert planned.num_image_tokens == [int((batch["input_ids"] == processor.image_token_id).sum())]


def test_pixels_alone_need_no_text(processor: KeyeProcessor) -> None:
    batch = processor(images=[IMAGE, PICTURE])
    assert batch["image_grid_thw"].shape == (2, 3)
    assert len(batch["pixel_values"]) == int(batch["image_grid_thw"].prod(dim=1).sum())
