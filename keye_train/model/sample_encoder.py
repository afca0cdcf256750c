"""A sample of a shard in, tensors of the training out: tokenizer, chat template, media and positions meet here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from keye_train.model.chat import (
    EncodedChat,
    MediaSlot,
    Message,
    encode_turns,
    first_answers,
    last_answer,
    media_slots,
    parse_turns,
    slots_of,
)
from keye_train.model.configuration import SPECIAL_TOKENS
from keye_train.model.images import decode_image
from keye_train.model.media_options import token_limit
from keye_train.model.messages import Medium
from keye_train.model.packed import IGNORE_INDEX
from keye_train.model.positions import PATCH_SIZE, Grid, grid_tokens, sample_positions
from keye_train.model.video_torchcodec import checked_backend
from keye_train.sample import Fit, MediaKind, Sample, SampleError, SampleRef
from keye_train.settings import ModelSettings, ResolutionSettings, SettingsError, VideoBackend

WHOLE = Fit()
"""Nothing is left out."""


@dataclass(frozen=True)
class EncodedSample:
    """One sample as tensors; L language tokens, M images and videos, P patches."""

    ref: SampleRef
    task: str
    input_ids: Tensor  # [L] int64
    labels: Tensor  # [L] int64, not shifted; IGNORE_INDEX outside assistant turns
    position_ids: Tensor  # [3, L] int64: time, height, width
    pixel_patches: Tensor  # [P, 3, 14, 14] uint8, in the order of the pad tokens
    grid_thw: Tensor  # [M, 3] int64, in patches


@dataclass(frozen=True)
class EncodedPair:
    """One image and its caption for Stage 0."""

    ref: SampleRef
    task: str
    pixel_patches: Tensor  # [P, 3, 14, 14] uint8
    grid_thw: Tensor  # [1, 3] int64, in patches
    text_ids: Tensor  # [max_tokens] int64, right-padded
    caption_tokens: int  # of text_ids: the words and the first pad token, which ends them, where there is room for one


class SampleEncoder:
    """Turns samples into tensors. Its faults are ValueErrors; those of the data are SampleErrors."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: ModelSettings,
        resolution: ResolutionSettings,
        video_backend: VideoBackend = VideoBackend.pyav,
        scaled_jpeg: bool = False,
    ) -> None:
        _check_special_tokens(tokenizer, model)
        _check_vocabulary(tokenizer, model.language.vocab_size, "model.language.vocab_size")
        self.tokenizer = tokenizer
        self.model = model
        self.resolution = resolution
        self.video_backend = checked_backend(video_backend)
        self.scaled_jpeg = scaled_jpeg

    @classmethod
    def from_settings(
        cls,
        model: ModelSettings,
        resolution: ResolutionSettings,
        video_backend: VideoBackend = VideoBackend.pyav,
        scaled_jpeg: bool = False,
    ) -> SampleEncoder:
        """Load the tokenizer from its folder; nothing is fetched and no code of the folder is run.

        Raises:
            SettingsError: no tokenizer there, or one that disagrees with ``model.special_tokens`` or
                ``model.language.vocab_size``; or torchcodec is asked for and cannot be loaded.
        """
        tokenizer = _load(PreTrainedTokenizerFast, model.tokenizer, "model.tokenizer")
        return cls(tokenizer, model, resolution, video_backend, scaled_jpeg)

    @cached_property
    def text_tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the captions of Stage 0, loaded on first use because no other stage needs it.

        Raises:
            SettingsError: it cannot be loaded, has no pad token, or does not fit ``model.text_tower.vocab_size``.
        """
        folder, setting = self.model.text_tower.tokenizer, "model.text_tower.tokenizer"
        tokenizer = self.tokenizer if folder is None else _load(AutoTokenizer, folder, setting)
        if tokenizer.pad_token_id is None:
            raise SettingsError(f"{setting}={folder}: no pad token; name one in tokenizer_config.json")
        _check_vocabulary(tokenizer, self.model.text_tower.vocab_size, "model.text_tower.vocab_size")
        return tokenizer

    def encode(self, sample: Sample, fit: Fit = WHOLE, out: np.ndarray | None = None) -> EncodedSample:
        """Tensors of a sample for the language objective.

        Args:
            sample: in any state.
            fit: what is taken of it.
            out: where the patches go, see ``images.place_patches``.

        Raises:
            SampleError: whatever is wrong with the sample, and samples that teach nothing (no assistant turn).
        """
        messages = first_answers(sample.messages, fit.answers)
        encoded = self._encode(sample, messages, generation_prompt=False, media_tokens=fit.media_tokens, out=out)
        if (encoded.labels.numpy() == IGNORE_INDEX).all():
            raise SampleError("conversation without an assistant turn")
        return encoded

    def encode_prompt(self, sample: Sample) -> EncodedSample:
        """Tensors of a sample up to the place where its last answer would begin; no label is set.

        Raises:
            SampleError: whatever is wrong with the sample.
        """
        parse_turns(sample.messages)
        answers = [i for i, message in enumerate(sample.messages) if message["role"] == "assistant"]
        messages = sample.messages[: answers[-1]] if answers else sample.messages
        encoded = self._encode(sample, messages, generation_prompt=True)
        encoded.labels.fill_(IGNORE_INDEX)
        return encoded

    def encode_pair(self, sample: Sample, fit: Fit = WHOLE, out: np.ndarray | None = None) -> EncodedPair:
        """The only image of a sample and its caption, which is the text of the last assistant turn.

        Args:
            sample: in any state.
            fit: what its image may take; the text is cut to the length of the text tower in any case.
            out: where the patches go, see ``images.place_patches``.

        Raises:
            SampleError: broken, no caption, or not exactly one image.
        """
        caption = last_answer(sample.messages)
        media = _media_of(sample, media_slots(sample.messages))
        if [kind for kind, _ in media] != [MediaKind.image]:
            raise SampleError(f"a caption pair needs exactly one image and nothing else, this has {len(media)} media")
        options = token_limit(MediaKind.image, fit.media_tokens, self.resolution)
        patches, grid = decode_image(media[0][1], self.resolution, options, self.scaled_jpeg, out)
        text_ids = self.text_ids([caption])[0]
        return EncodedPair(
            sample.ref,
            sample.task,
            torch.from_numpy(patches),
            torch.tensor([grid]),
            text_ids,
            self._through_first_pad(text_ids),
        )

    def _through_first_pad(self, text_ids: Tensor) -> int:
        words = int((text_ids == self.text_tokenizer.pad_token_id).int().cumsum(0).eq(0).sum())
        return min(words + 1, len(text_ids))

    def text_ids(self, captions: Sequence[str]) -> Tensor:
        """Captions for the text tower: [B, max_tokens] int64, cut or padded on the right."""
        encoded = self.text_tokenizer(
            list(captions),
            max_length=self.model.text_tower.max_tokens,
            truncation=True,
            padding="max_length",
            padding_side="right",
            split_special_tokens=True,
        )
        return torch.tensor(encoded["input_ids"])

    def _encode(
        self,
        sample: Sample,
        messages: list[Message],
        generation_prompt: bool,
        media_tokens: int = 0,
        out: np.ndarray | None = None,
    ) -> EncodedSample:
        patches: list[np.ndarray] = []
        grids: list[Grid] = []
        seconds: list[float] = []
        turns = parse_turns(messages)
        used = 0
        for kind, data in _media_of(sample, slots_of(turns)):
            medium = Medium(kind, data, token_limit(kind, media_tokens, self.resolution))
            room = None if out is None else out[used:]
            pixels = medium.pixels(self.resolution, backend=self.video_backend, scaled_jpeg=self.scaled_jpeg, out=room)
            used += len(pixels.patches)
            patches.append(pixels.patches)
            grids.append(pixels.grid)
            seconds.append(pixels.seconds_per_grid)
        chat: EncodedChat = encode_turns(
            self.tokenizer, turns, [grid_tokens(grid) for grid in grids], generation_prompt
        )
        ids = self.model.special_tokens
        position_ids = sample_positions(
            chat.input_ids, grids, seconds, image_pad_id=ids.image_pad, video_pad_id=ids.video_pad
        )
        return EncodedSample(
            ref=sample.ref,
            task=sample.task,
            input_ids=chat.input_ids,
            labels=chat.labels,
            position_ids=position_ids,
            pixel_patches=torch.from_numpy(_joined(patches) if out is None or used > len(out) else out[:used]),
            grid_thw=torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        )


def _joined(patches: list[np.ndarray]) -> np.ndarray:
    """Patches of all media one behind another; those of a single one are not copied."""
    if len(patches) == 1:
        return patches[0]
    return np.concatenate([np.empty((0, 3, PATCH_SIZE, PATCH_SIZE), dtype=np.uint8), *patches])


def _media_of(sample: Sample, slots: list[MediaSlot]) -> list[tuple[MediaKind, bytes]]:
    for slot in slots:
        if slot.name not in sample.media:
            raise SampleError(f"{slot.kind.value} {slot.name!r} is not in the shard; media: {sorted(sample.media)}")
    return [(slot.kind, sample.media[slot.name]) for slot in slots]


def _load(loader: Any, folder: str, setting: str) -> PreTrainedTokenizerBase:
    if not (Path(folder) / "tokenizer_config.json").is_file():
        raise SettingsError(f"{setting}={folder}: no tokenizer_config.json there; name a folder that holds a tokenizer")
    try:
        return loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{setting}={folder}: the tokenizer cannot be loaded: {error}") from error


def _check_special_tokens(tokenizer: PreTrainedTokenizerBase, model: ModelSettings) -> None:
    vocabulary = tokenizer.get_vocab()
    for name, (token, _) in SPECIAL_TOKENS.items():
        if token not in vocabulary:
            raise SettingsError(f"model.tokenizer={model.tokenizer} has no token {token}")
        wanted = getattr(model.special_tokens, name)
        if vocabulary[token] != wanted:
            raise SettingsError(
                f"model.special_tokens.{name}={wanted}, but {token} is {vocabulary[token]} in "
                f"model.tokenizer={model.tokenizer}: set model.special_tokens.{name}={vocabulary[token]}"
            )


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, setting: str) -> None:
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise SettingsError(f"{setting}={vocab_size} is too small: the tokenizer has ids up to {largest}")
