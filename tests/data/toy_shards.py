"""Toy tokenizers, pictures, videos and settings for the tests of the data chain; made in a moment, all real."""

from __future__ import annotations

import io
import json
from pathlib import Path

import av
import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from keye_train.settings import (
    DataSettings,
    DeepSpeedSettings,
    LanguageModelSettings,
    LoggingSettings,
    ModelSettings,
    Objective,
    ResolutionSettings,
    SourceSettings,
    SpecialTokenSettings,
    StageSettings,
    TextTowerSettings,
    TrainSettings,
)

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

Members = dict[str, bytes]


def write_tokenizer(folder: Path, extra: tuple[str, ...] = ()) -> Path:
    """A byte-level tokenizer without merges: one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([*SPECIAL, *extra])
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>").save_pretrained(
        folder
    )
    return folder


def picture(width: int, height: int, seed: int = 0, kind: str = "JPEG") -> bytes:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def clip(width: int, height: int, frames: int) -> bytes:
    """A real mp4 at 8 frames a second."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            pixels = np.full((height, width, 3), number * 10 % 256, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    return file.getvalue()


def chat(text: str, answer: str, **media: str) -> bytes:
    """JSON of one question and answer; ``media`` maps kinds to member names."""
    content = [{"type": kind, kind: name} for kind, name in media.items()] + [{"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages, "task": "vqa"}).encode()


def mixed_samples(count: int, seed: int = 0) -> list[Members]:
    """Texts, pictures of many sizes in several layouts, and a clip now and then."""
    rng = np.random.default_rng(seed)
    samples: list[Members] = []
    for number in range(count):
        width, height = (int(side) for side in rng.integers(20, 200, 2))
        words = "word " * int(rng.integers(1, 12)) + str(number)
        if number % 4 == 0:
            samples.append({"txt": words.encode()})
        elif number % 4 == 1:
            samples.append({"jpg": picture(width, height, number), "txt": words.encode()})
        elif number % 8 == 3:
            samples.append({"0.mp4": clip(64, 48, 8), "json": chat("What moves?", words, video="0.mp4")})
        else:
            samples.append(
                {"0.png": picture(width, height, number, "PNG"), "json": chat("What?", words, image="0.png")}
            )
    return samples


def toy_resolution() -> ResolutionSettings:
    """Few tokens for every picture and video."""
    return ResolutionSettings(
        image_max_tokens=30, video_frame_min_tokens=1, video_frame_max_tokens=6, video_max_tokens=64
    )


def toy_settings(sources: dict[str, SourceSettings], tokenizer_dir: Path, **changes: object) -> TrainSettings:
    """Settings of a run on toy shards; ``changes`` replace fields of the stage and of the data."""
    ids = {token: 256 + number for number, token in enumerate(SPECIAL)}
    special = SpecialTokenSettings(
        bos=ids["<|endoftext|>"],
        eos=ids["<|im_end|>"],
        pad=ids["<|endoftext|>"],
        vision_start=ids["<|vision_start|>"],
        vision_end=ids["<|vision_end|>"],
        vision_pad=ids["<|vision_pad|>"],
        image_pad=ids["<|image_pad|>"],
        video_pad=ids["<|video_pad|>"],
    )
    settings = TrainSettings(
        stage=StageSettings(
            name="toy",
            objective=Objective.language,
            trainable=["projector"],
            mixture="mix",
            steps=6,
            max_tokens=400,
            max_patches=600,
            global_batch_packs=4,
        ),
        model=ModelSettings(
            name="toy",
            tokenizer=str(tokenizer_dir),
            language=LanguageModelSettings(vocab_size=300),
            text_tower=TextTowerSettings(vocab_size=300, max_tokens=16),
            special_tokens=special,
        ),
        data=DataSettings(
            name="toy",
            root="",
            sources=sources,
            mixtures={"mix": dict(zip(sources, (0.7, 0.3), strict=False))},
            resolution=toy_resolution(),
            window_samples=64,
            workers=0,
        ),
        deepspeed=DeepSpeedSettings(),
        logging=LoggingSettings(),
        run_dir="run",
    )
    for name, value in changes.items():
        owner = settings.stage if hasattr(settings.stage, name) else settings.data
        setattr(owner, name, value)
    return settings
