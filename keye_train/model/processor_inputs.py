"""What a call of the processors is given, put in order, and what it returns for pixels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature

from keye_train.model.messages import Pixels
from keye_train.model.packed import IGNORE_INDEX
from keye_train.model.positions import grid_tokens, rope_index
from keye_train.model.vision import normalize_levels
from keye_train.sample import MediaKind

PADS = {MediaKind.image: "<|image_pad|>", MediaKind.video: "<|video_pad|>"}
PADDING_OPTIONS = frozenset({"padding", "padding_side", "pad_to_multiple_of", "max_length", "truncation"})


def listed_images(images: Any) -> list[Any]:
    """One image, a list of images or one list for each text -> one list."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in listed_images(item)]
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def listed_videos(videos: Any) -> list[Any]:
    """One video, or a list of them, of which each may be a list of frames.

    A list of pictures or arrays of one picture is one video; a list of anything else is a list of videos.
    """
    if videos is None:
        return []
    if not isinstance(videos, (list, tuple)):
        return list(videos) if isinstance(videos, (np.ndarray, Tensor)) and videos.ndim == 5 else [videos]
    if videos and all(_is_picture(item) for item in videos):
        return [videos]
    return list(videos)


def rates(fps: float | Sequence[float] | None, videos: int) -> list[float | None]:
    """The rate of each video.

    Raises:
        ValueError: another number of rates than videos.
    """
    if fps is None or isinstance(fps, (int, float)):
        return [fps] * videos
    if len(fps) != videos:
        raise ValueError(f"{len(fps)} values of fps for {videos} videos")
    return [float(rate) for rate in fps]


def expand_pads(texts: Sequence[str], pixels: Sequence[Pixels], strict: bool) -> list[str]:
    """Replace the i-th pad of each kind, counted over all texts, by as many as the i-th medium of that kind has tokens.

    Args:
        texts: texts of the chat template.
        pixels: all media of the batch.
        strict: pads and media must match. Else as the published code: superfluous media are left over, and where there
            are no media of a kind at all, its pads stay as they are.

    Raises:
        ValueError: ``strict``, and they do not match.
        IndexError: not ``strict``, and there are more pads than media.
    """
    expanded = list(texts)
    for kind, pad in PADS.items():
        counts = [grid_tokens(item.grid) for item in pixels if item.kind == kind]
        pads = sum(text.count(pad) for text in expanded)
        if strict and pads != len(counts):
            raise ValueError(
                f"{pads} times {pad} in the text for {len(counts)} {kind.value}s. Where a message itself holds {pad}, "
                "use apply_chat_template(messages, tokenize=True), which reads it as ordinary text"
            )
        if not counts:
            continue
        if pads > len(counts):
            raise IndexError(f"{pads} times {pad} in the text for {len(counts)} {kind.value}s")
        left = iter(counts)
        expanded = [_expanded(text, pad, left) for text in expanded]
    return expanded


def padding_options(options: dict[str, Any], padding: bool | str) -> dict[str, Any]:
    """Take what a tokenizer pads with out of ``options``, where None stands for not given.

    Args:
        options: options of a call; ``padding``, ``padding_side``, ``pad_to_multiple_of``, ``max_length`` and
            ``truncation`` are removed.
        padding: what holds unless ``options`` has another.

    Raises:
        ValueError: ``truncation``, or a ``max_length`` that is not padded to.
    """
    if options.pop("truncation", None) not in (None, False, "do_not_truncate"):
        raise ValueError(
            "truncation would cut images and videos off their tokens: leave it out and shorten the conversation, or "
            "lower max_pixels, fps or nframes; count_tokens gives its length"
        )
    asked = {name: value for name in PADDING_OPTIONS if (value := options.pop(name, None)) is not None}
    found = {"padding": padding, **asked}
    if "max_length" in found and found["padding"] != "max_length":
        raise ValueError(
            f'max_length={found["max_length"]} is what padding="max_length" fills up to, and conversations are never '
            "cut: pass that too, or leave max_length out"
        )
    return found


def check_length(encoded: Mapping[str, Any], padding: Mapping[str, Any]) -> None:
    """Refuse a batch with a row above the ``max_length`` of ``padding_options``.

    Raises:
        ValueError: such a row.
    """
    longest = max(sum(mask) for mask in encoded["attention_mask"])
    if longest > padding.get("max_length", longest):
        raise ValueError(
            f"a conversation of {longest} tokens is above max_length={padding['max_length']} and is never cut: raise "
            "max_length or shorten the conversation"
        )


def check_variables(names: Iterable[str], template: str | Mapping[str, str] | None) -> None:
    """Refuse arguments that no chat template reads.

    Args:
        names: arguments that are no options of the call.
        template: a chat template, or several by name.

    Raises:
        ValueError: one of ``names`` does not occur in it.
    """
    written = " ".join(template.values()) if isinstance(template, Mapping) else template or ""
    words = set(re.findall(r"\w+", written))
    unknown = sorted(set(names) - words)
    if unknown:
        raise ValueError(
            f"apply_chat_template with tokenize=True: unknown {', '.join(unknown)}, neither an option nor a variable "
            "of the chat template; correct its name or leave it out"
        )


def media_arrays(pixels: Sequence[Pixels]) -> dict[str, Any]:
    """Media as the model is called with: normalised patches, grids, seconds; nothing for a kind that is not there."""
    arrays: dict[str, Any] = {}
    names = {
        MediaKind.image: ("pixel_values", "image_grid_thw"),
        MediaKind.video: ("pixel_values_videos", "video_grid_thw"),
    }
    for kind, (values, grids) in names.items():
        own = [item for item in pixels if item.kind == kind]
        if own:
            levels = torch.from_numpy(np.concatenate([item.patches for item in own]))
            arrays[values] = normalize_levels(levels).numpy()
            arrays[grids] = np.array([item.grid for item in own], dtype=np.int64)
    seconds = [item.seconds_per_grid for item in pixels if item.kind == MediaKind.video]
    if seconds:
        arrays["second_per_grid_ts"] = np.array(seconds, dtype=np.float32)
    return arrays


def model_inputs(
    encoded: Mapping[str, Any],
    pixels: Sequence[Pixels],
    labels: Sequence[Tensor] | None,
    position_tokens: Mapping[str, int] | None,
    return_tensors: str | None,
) -> BatchFeature:
    """Everything that ``forward`` takes.

    Args:
        encoded: input_ids and attention_mask of a padded batch.
        pixels: media of the batch in order.
        labels: of each row, without its padding; None: no labels are asked for.
        position_tokens: the special tokens that ``rope_index`` looks for; None: no positions are asked for.
        return_tensors: "pt", "np" or None.

    Raises:
        ValueError: labels or positions are asked for in anything but torch tensors.
    """
    data = {name: values for name, values in encoded.items() if name in ("input_ids", "attention_mask")}
    batch = BatchFeature(data | media_arrays(pixels), tensor_type=return_tensors)
    if labels is None and position_tokens is None:
        return batch
    if return_tensors != "pt":
        raise ValueError('return_labels and return_position_ids need return_tensors="pt"')
    if labels is not None:
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        batch["labels"][batch["attention_mask"].bool()] = torch.cat(list(labels))
    if position_tokens is not None:
        batch["position_ids"], batch["rope_deltas"] = rope_index(
            batch["input_ids"],
            batch["attention_mask"],
            batch.get("image_grid_thw"),
            batch.get("video_grid_thw"),
            batch.get("second_per_grid_ts"),
            **position_tokens,
        )
    return batch


def _expanded(text: str, pad: str, counts: Iterator[int]) -> str:
    first, *rest = text.split(pad)
    return first + "".join(pad * next(counts) + part for part in rest)


def _is_picture(item: Any) -> bool:
    return isinstance(item, Image.Image) or (isinstance(item, (np.ndarray, Tensor)) and item.ndim in (2, 3))
