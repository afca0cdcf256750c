"""Small real inputs: pictures, encoded videos, and a tokenizer with Keye's special tokens."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import av
import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from keye_train.settings import LanguageModelSettings, ModelSettings, SpecialTokenSettings, TextTowerSettings

CONTROL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
WORD_TOKENS = ["<|box_start|>", "<|box_end|>", "<think>", "</think>"]


def synthetic_image(height: int, width: int, k: int = 0) -> np.ndarray:
    """The picture behind the recorded numbers: [height, width, 3] uint8 (tests/golden/README.md)."""
    y, x, c = np.ogrid[:height, :width, :3]
    levels = (3 + c + k) * x + (5 + 2 * c) * y + (x * y) // (7 + c + k) + 13 * k
    return (levels % 256).astype(np.uint8)


def image_bytes(picture: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat_frames(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Frames that can be told apart after lossy coding: frame i has the level 8 * i."""
    return [np.full((height, width, 3), 8 * i, dtype=np.uint8) for i in range(count)]


def video_bytes(
    frames: Sequence[np.ndarray],
    fps: int = 10,
    *,
    container: str = "mp4",
    codec: str = "libx264",
    key_every: int = 250,
    rotation: int = 0,
) -> bytes:
    """Encode frames [height, width, 3] uint8; height and width even."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000  # flat frames must stay apart
        stream.codec_context.gop_size = key_every
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def damaged(data: bytes, seed: int) -> bytes:
    """Overwrite a few bytes, most of them in the header, and sometimes cut the end off."""
    rng = np.random.default_rng(seed)
    changed = bytearray(data)
    for _ in range(rng.integers(1, 12)):
        changed[rng.integers(min(len(changed), rng.choice([64, 400, len(changed)])))] = rng.integers(256)
    return bytes(changed[: rng.integers(1, len(changed))] if rng.random() < 0.2 else changed)


@cache
def toy_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=CONTROL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(["system user assistant", "What is the colour of the square? The square is red."], trainer)
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in WORD_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=CONTROL_TOKENS,
    )


def toy_model_settings(folder: Path) -> ModelSettings:
    """Settings whose tokenizer is the toy one, saved in ``folder``."""
    tokenizer = toy_tokenizer()
    tokenizer.save_pretrained(folder)
    ids = {name.strip("<|>"): tokenizer.convert_tokens_to_ids(name) for name in CONTROL_TOKENS}
    return ModelSettings(
        name="toy",
        tokenizer=str(folder),
        language=LanguageModelSettings(vocab_size=len(tokenizer)),
        text_tower=TextTowerSettings(vocab_size=len(tokenizer), max_tokens=12),
        special_tokens=SpecialTokenSettings(
            bos=ids["endoftext"],
            eos=ids["im_end"],
            pad=ids["endoftext"],
            **{name: ids[name] for name in ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")},
        ),
    )
