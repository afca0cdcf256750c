"""``preprocessor_config.json`` of Keye and the image processor that it describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypedDict

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import ImageProcessingMixin

from keye_train.model.media import read_image
from keye_train.model.media_options import PIXELS_PER_TOKEN, image_limits, media_options
from keye_train.model.messages import Medium, Pixels
from keye_train.model.positions import MERGE_SIZE, PATCH_SIZE
from keye_train.model.processor_inputs import listed_images, media_arrays
from keye_train.model.published_pixels import image_patches
from keye_train.sample import MediaKind
from keye_train.settings import ResolutionSettings

_FIXED = {"patch_size": PATCH_SIZE, "temporal_patch_size": 1, "merge_size": MERGE_SIZE}


class ImageOptions(TypedDict, total=False):
    """What ``from_pretrained`` takes in place of the values of ``preprocessor_config.json``."""

    min_pixels: int
    max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    image_mean: Sequence[float]
    image_std: Sequence[float]


class KeyeImageProcessor(ImageProcessingMixin):
    """Pictures -> ``pixel_values`` [N, 3, 14, 14] float32 in raster order, and ``image_grid_thw`` [images, 3] int64.

    Args:
        min_pixels, max_pixels: limits of one image after its resize; 784 pixels are one language token.
        patch_size, temporal_patch_size, merge_size, image_mean, image_std: what the model was made for; other values
            are refused.

    Raises:
        ValueError: a value that Keye does not have.
    """

    valid_kwargs = ImageOptions  # transformers' name: the options of ``from_pretrained``
    model_input_names = ["pixel_values", "image_grid_thw"]  # noqa: RUF012  # the name and type of the base class

    def __init__(
        self,
        min_pixels: int = 4 * PIXELS_PER_TOKEN,
        max_pixels: int = 16_384 * PIXELS_PER_TOKEN,
        patch_size: int = PATCH_SIZE,
        temporal_patch_size: int = 1,
        merge_size: int = MERGE_SIZE,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        given = {"patch_size": patch_size, "temporal_patch_size": temporal_patch_size, "merge_size": merge_size}
        for name, value in given.items():
            if value != _FIXED[name]:
                raise ValueError(f"preprocessor_config.json: {name}={value}, but Keye has {_FIXED[name]}")
        if [*image_mean, *image_std] != [0.5] * 6:
            raise ValueError(f"preprocessor_config.json: image_mean={image_mean}, image_std={image_std}; Keye has 0.5")
        if not 0 < min_pixels <= max_pixels:
            raise ValueError(f"min_pixels={min_pixels} must be above 0 and at most max_pixels={max_pixels}")
        self.min_pixels, self.max_pixels = int(min_pixels), int(max_pixels)
        self.patch_size, self.temporal_patch_size, self.merge_size = patch_size, temporal_patch_size, merge_size
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    @classmethod
    def from_resolution(cls, resolution: ResolutionSettings) -> KeyeImageProcessor:
        """One with the budgets of a recipe; ``resolution`` gives them back."""
        limits = image_limits(resolution)
        return cls(min_pixels=limits["min_pixels"], max_pixels=limits["max_pixels"])

    def resolution(self, base: ResolutionSettings | None = None) -> ResolutionSettings:
        """``base`` with the limits of an image from here."""
        return replace(
            base or ResolutionSettings(),
            image_min_tokens=-(-self.min_pixels // PIXELS_PER_TOKEN),
            image_max_tokens=max(1, self.max_pixels // PIXELS_PER_TOKEN),
        )

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        """See ``preprocess``."""
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images: Any,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        published: bool = False,
        allow_http: bool = False,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Resize each image once, normalise, and cut into patches.

        Args:
            images: one image or a list of them; a path, URI, bytes, picture or array (``media.read_image``).
            min_pixels, max_pixels: limits of this call.
            published: as the published image processor, which drops the limits of the call, drops transparency and
                takes a picture 1 or 3 pixels high for channels-first.
            allow_http: whether ``http://`` and ``https://`` may be fetched.
            return_tensors: "pt" or "np".

        Raises:
            SampleError: an image that cannot be read.
            ValueError: with ``published``, what that refuses.
        """
        cut = [
            self.pixels(image, min_pixels, max_pixels, published=published, allow_http=allow_http)
            for image in listed_images(images)
        ]
        return BatchFeature(media_arrays(cut), tensor_type=return_tensors)

    def pixels(
        self, image: Any, min_pixels: int | None, max_pixels: int | None, *, published: bool, allow_http: bool
    ) -> Pixels:
        """Patches of one image; arguments and errors as for ``preprocess``."""
        if published:
            source = image if isinstance(image, (np.ndarray, torch.Tensor)) else read_image(image, allow_http)
            return Pixels(MediaKind.image, *image_patches(source, self.min_pixels, self.max_pixels), 0.0)
        options = media_options({"min_pixels": min_pixels, "max_pixels": max_pixels}, MediaKind.image)
        return Medium(MediaKind.image, image, options).pixels(self.resolution(), allow_http)
