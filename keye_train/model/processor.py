"""``KeyeProcessor``: the processor that transformers users expect, on the functions that the training reads data with.

Two modes. The default is what training does: one resize, every limit honoured, real frame rates, control tokens put
in by id. ``published=True`` gives the ids and pixels of the published inference code, faults included; the list is in
``docs/processor.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData

from keye_train.model import published_pixels
from keye_train.model.chat import CHAT_TEMPLATE, chat_text, encode_conversation, text_token_count
from keye_train.model.media import read_video
from keye_train.model.media_options import OPTION_NAMES, MediaRequest, media_options
from keye_train.model.messages import Medium, Pixels, split_media
from keye_train.model.positions import grid_tokens
from keye_train.model.processor_base import StoredProcessor
from keye_train.model.processor_inputs import (
    PADDING_OPTIONS,
    check_length,
    check_variables,
    expand_pads,
    listed_images,
    listed_videos,
    media_arrays,
    model_inputs,
    padding_options,
    rates,
)
from keye_train.model.published import DEFAULT_FPS
from keye_train.sample import MediaInfo, MediaKind, SampleError


class KeyeProcessor(StoredProcessor):
    """Text, images and videos -> what ``KeyeForConditionalGeneration.forward`` takes.

    Args:
        image_processor: limits of images; None: those of the first report.
        tokenizer: a fast tokenizer with the special tokens of Keye.
        chat_template: Jinja template; None: Keye's.
        video: limits of videos in the names of ``MediaOptions``, of which any may be left out: ``min_pixels`` and
            ``max_pixels`` of a frame, ``total_pixels``, ``fps``, ``min_frames``, ``max_frames``.
        video_backend: what decodes videos; not written to the folder, because it belongs to the machine.

    Raises:
        ValueError: no tokenizer, or limits that cannot hold together.
    """

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        videos: Any = None,
        *,
        fps: float | Sequence[float] | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        videos_kwargs: Mapping[str, Any] | None = None,
        published: bool = False,
        allow_http: bool = False,
        return_position_ids: bool = False,
        return_tensors: str | None = "pt",
        **text_kwargs: Any,
    ) -> BatchFeature:
        """Encode text that went through the chat template, with the images and videos that its pads stand for.

        Text is read as it is, control tokens included: a literal ``<|image_pad|>`` cannot be told from one of the
        template. ``apply_chat_template(..., tokenize=True)`` puts them in by id and is safe with any text.

        Args:
            text: one text or a batch. None: only the pixels are returned.
            images: images of the whole batch in order (nested lists are flattened); see ``media.read_image``.
            videos: videos likewise; see ``media.read_video``.
            fps: for each video, or for all: the rate to sample a file at, or the rate that frames were taken at.
            min_pixels, max_pixels: limits of each image of this call.
            videos_kwargs: options of each video of this call (``MediaOptions``).
            published: as the published code, which drops ``min_pixels``, ``max_pixels`` and ``videos_kwargs``, takes
                every video for 2 frames a second unless ``fps`` is given, and expands whatever pads it finds.
            allow_http: whether ``http://`` and ``https://`` may be fetched.
            return_position_ids: add ``position_ids`` [3, B, L] and ``rope_deltas`` [B, 1].
            return_tensors: "pt", "np" or None.
            text_kwargs: for the tokenizer; ``padding`` is True unless given. transformers' groups ``images_kwargs``,
                ``text_kwargs`` and ``common_kwargs`` are taken apart.

        Returns:
            input_ids and attention_mask [B, L]; with images pixel_values [N, 3, 14, 14] float32 and
            image_grid_thw [images, 3]; with videos pixel_values_videos, video_grid_thw and second_per_grid_ts [videos].

        Raises:
            SampleError: media that cannot be read.
            ValueError: pads and media do not match, or frames are given without their rate.
        """
        for group in ("images_kwargs", "text_kwargs", "common_kwargs"):
            if group in text_kwargs:
                given = dict(text_kwargs.pop(group) or {})
                min_pixels, max_pixels = given.pop("min_pixels", min_pixels), given.pop("max_pixels", max_pixels)
                return_tensors = given.pop("return_tensors", return_tensors)
                text_kwargs = {**given, **text_kwargs}
        pixels = [
            self.image_processor.pixels(image, min_pixels, max_pixels, published=published, allow_http=allow_http)
            for image in listed_images(images)
        ]
        asked = listed_videos(videos)
        for video, rate in zip(asked, rates(fps, len(asked)), strict=True):
            asked_of = {**(videos_kwargs or {}), **({} if rate is None else {"fps": rate})}
            pixels.append(self._video_pixels(video, asked_of, published, allow_http))
        if text is None:
            return BatchFeature(media_arrays(pixels), tensor_type=return_tensors)
        texts = expand_pads([text] if isinstance(text, str) else list(text), pixels, strict=not published)
        encoded = self.tokenizer(texts, **{"padding": True, **text_kwargs})
        return self._batch(dict(encoded), pixels, None, return_position_ids, return_tensors)

    def apply_chat_template(  # type: ignore[override]  # what Keye has no use for is left out
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        add_vision_id: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_labels: bool = False,
        return_position_ids: bool = False,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        published: bool = False,
        allow_http: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Turn a conversation, or a batch of them, into text, or with ``tokenize`` into what the model takes.

        Media stand in the messages, with their options: ``{"type": "image", "image": SOURCE, "max_pixels": ...}``;
        see ``messages.split_media`` and ``media_options.MediaOptions``.

        Args:
            conversation: list of messages, or list of such lists.
            chat_template: another Jinja template; only without ``tokenize``.
            add_generation_prompt: open an assistant turn at the end.
            continue_final_message: leave the last turn open.
            add_vision_id: number the media: "Picture 1: ".
            tokenize: return tensors instead of text.
            return_dict: with ``tokenize``: all tensors; else only ``input_ids``.
            return_labels: add ``labels`` [B, L]: the texts of assistant turns with their <|im_end|>; the rest is -100.
            return_position_ids, return_tensors, allow_http: as for a call.
            padding, padding_side, pad_to_multiple_of, max_length: as for a tokenizer; ``max_length`` is only what
                ``padding="max_length"`` fills up to, since a conversation is never cut.
            truncation: refused with ``tokenize``.
            published: as the published pipeline: both packages' resizes, its video sampling, control tokens by text.
            processor_kwargs: options for media, for padding and ``return_tensors``, as transformers groups them.
            kwargs: options (``MediaOptions``) for every medium that does not have its own, which ``published`` drops;
                the rest are variables of the template. None counts as not given.

        Raises:
            SampleError: messages that are none, or media that cannot be read.
            ValueError: arguments that exclude each other; with ``tokenize`` also truncation, a template that is not
                Keye's, or an argument that is neither an option nor a variable of the template.
        """
        given = dict(processor_kwargs or {})
        return_tensors = given.pop("return_tensors", return_tensors)
        if tokenize:
            kwargs |= {name: given.pop(name) for name in PADDING_OPTIONS & set(given)}
            pad = padding_options(kwargs, padding)
        kwargs |= media_options(given, MediaKind.video, strict=True)
        options = {name: kwargs.pop(name) for name in sorted(OPTION_NAMES & set(kwargs))}
        render = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "add_vision_id": add_vision_id,
            **kwargs,
        }
        if not tokenize:
            return super().apply_chat_template(conversation, chat_template=chat_template, tokenize=False, **render)
        own_template = None if self.chat_template == CHAT_TEMPLATE else self.chat_template
        check_variables([name for name, value in kwargs.items() if value is not None], own_template)
        if chat_template is not None:
            raise ValueError("tokenize=True knows Keye's template only: render the text and call the processor with it")
        if add_generation_prompt and continue_final_message:
            raise ValueError("add_generation_prompt and continue_final_message exclude each other")
        if not conversation:
            raise SampleError("conversation without messages")
        conversations = [conversation] if isinstance(conversation[0], Mapping) else list(conversation)
        if published and return_labels:
            raise ValueError("the published pipeline has no labels: return_labels needs published=False")
        encode = self._encode_as_published if published else self._encode_by_id
        encoded, pixels, labels = encode(conversations, render, options, pad, allow_http)
        check_length(encoded, pad)
        batch = self._batch(encoded, pixels, labels if return_labels else None, return_position_ids, return_tensors)
        return batch if return_dict else batch["input_ids"]

    def count_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        allow_http: bool = False,
        **options: Any,
    ) -> int:
        """Language tokens of a conversation in default mode; of media only the headers are read.

        Args:
            messages, add_generation_prompt, allow_http, options: as for ``apply_chat_template``.

        Raises:
            SampleError: see ``apply_chat_template``.
        """
        plain, media = split_media(messages, options=options)
        text = text_token_count(self.tokenizer, plain, add_generation_prompt)
        return text + sum(medium.request(self.resolution, allow_http).tokens for medium in media)

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **options: Any
    ) -> MultiModalData:
        """Tokens and patches of images of (height, width) pixels: what serving engines plan with."""
        found: dict[str, list[int]] = {} if image_sizes is None else {"num_image_tokens": [], "num_image_patches": []}
        asked = {name: value for name, value in options.items() if name in OPTION_NAMES}
        for height, width in image_sizes or ():
            info = MediaInfo(MediaKind.image, width, height)
            request = MediaRequest.of(info, self.resolution, media_options(asked, MediaKind.image))
            found["num_image_tokens"].append(request.tokens)
            found["num_image_patches"].append(request.grid[1] * request.grid[2])
        return MultiModalData(**found)

    # -------------------------------------------------------------------------------------------- parts

    def _encode_by_id(
        self,
        conversations: list[Any],
        render: dict[str, Any],
        options: Mapping[str, Any],
        pad: Mapping[str, Any],
        allow_http: bool,
    ) -> tuple[dict[str, Any], list[Pixels], list[Tensor]]:
        """Ids, media and labels (of the tokens that are no padding), by the functions that training encodes with."""
        pixels: list[Pixels] = []
        ids: list[list[int]] = []
        labels: list[Tensor] = []
        for messages in conversations:
            plain, media = split_media(messages, render["add_vision_id"], options)
            self._check_template(messages, plain, render)
            own = [medium.pixels(self.resolution, allow_http, self.backend) for medium in media]
            counts = [grid_tokens(item.grid) for item in own]
            chat = encode_conversation(self.tokenizer, plain, counts, render["add_generation_prompt"])
            length = len(chat.input_ids)
            if render["continue_final_message"]:
                length = int((chat.input_ids == self._token_id("<|im_end|>")).nonzero()[-1])
            ids.append(chat.input_ids[:length].tolist())
            labels.append(chat.labels[:length])
            pixels += own
        return dict(self.tokenizer.pad({"input_ids": ids}, **pad)), pixels, labels

    def _encode_as_published(
        self,
        conversations: list[Any],
        render: dict[str, Any],
        _: Mapping[str, Any],
        pad: Mapping[str, Any],
        allow_http: bool,
    ) -> tuple[dict[str, Any], list[Pixels], None]:
        texts = super().apply_chat_template(conversations, tokenize=False, **render)
        media = [medium for messages in conversations for medium in split_media(messages)[1]]
        limits = self.image_processor.min_pixels, self.image_processor.max_pixels
        pixels = [medium.published_pixels(*limits, allow_http) for medium in media]
        return dict(self.tokenizer(expand_pads(list(texts), pixels, strict=False), **pad)), pixels, None

    def _video_pixels(self, video: Any, asked: Mapping[str, Any], published: bool, allow_http: bool) -> Pixels:
        if not published:
            options = media_options(asked, MediaKind.video, strict=True)
            return Medium(MediaKind.video, video, options).pixels(self.resolution, allow_http, self.backend)
        source = read_video(video, allow_http)
        if isinstance(source, (bytes, Path)):
            frames, _ = published_pixels.fetch_video(source, {})
        else:
            frames = [np.asarray(frame.convert("RGB")) for frame in source]
        cut = published_pixels.video_patches(frames, self.image_processor.min_pixels, self.image_processor.max_pixels)
        return Pixels(MediaKind.video, *cut, 1 / asked.get("fps", DEFAULT_FPS))

    def _check_template(self, messages: Any, plain: Any, render: dict[str, Any]) -> None:
        """Refuse to encode by id what the processor's own template would have written differently."""
        if self.chat_template == CHAT_TEMPLATE:
            return
        asked = {**render, "continue_final_message": False}
        written = super().apply_chat_template(list(messages), tokenize=False, **asked)
        if written != chat_text(plain, render["add_generation_prompt"]):
            raise ValueError(
                "this processor's chat template is not Keye's, so tokenize=True would not follow it: render the text "
                "with tokenize=False and call the processor with it"
            )

    def _batch(
        self,
        encoded: dict[str, Any],
        pixels: list[Pixels],
        labels: list[Tensor] | None,
        return_position_ids: bool,
        return_tensors: str | None,
    ) -> BatchFeature:
        tokens = {
            "vision_start_id": self.vision_start_token_id,
            "image_pad_id": self.image_token_id,
            "video_pad_id": self.video_token_id,
        }
        return model_inputs(encoded, pixels, labels, tokens if return_position_ids else None, return_tensors)
