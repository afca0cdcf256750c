"""The parts of a processor, its budgets, and the folder that it is kept in; ``processor.py`` makes it encode."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from keye_train.model.chat import CHAT_TEMPLATE
from keye_train.model.image_processor import ImageOptions, KeyeImageProcessor
from keye_train.model.media_options import video_limits, with_video_limits
from keye_train.model.processor_files import PROCESSOR, processor_fields, template_file
from keye_train.model.processor_inputs import PADS
from keye_train.model.video_torchcodec import checked_backend
from keye_train.sample import MediaKind
from keye_train.settings import ResolutionSettings, VideoBackend

# Options of from_pretrained that say where files are, and those of the processor itself; others are the tokenizer's.
_FILES = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"}
_OWN = {"image_processor", "tokenizer", "chat_template", "video", "video_backend", "return_unused_kwargs"}


class StoredProcessor(ProcessorMixin):
    """Tokenizer, budgets and chat template; arguments and errors as for ``KeyeProcessor``."""

    def __init__(
        self,
        image_processor: KeyeImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        video: Mapping[str, float] | None = None,
        video_backend: VideoBackend | str = VideoBackend.pyav,
    ) -> None:
        if tokenizer is None:
            raise ValueError("KeyeProcessor needs a tokenizer")
        super().__init__(
            image_processor or KeyeImageProcessor(), tokenizer, chat_template=chat_template or CHAT_TEMPLATE
        )
        self.video = video_limits(with_video_limits(ResolutionSettings(), video or {}))
        self.backend = checked_backend(VideoBackend(video_backend))
        self.image_token, self.video_token = PADS[MediaKind.image], PADS[MediaKind.video]
        self.image_token_id = self._token_id(self.image_token)
        self.video_token_id = self._token_id(self.video_token)
        self.vision_start_token_id = self._token_id("<|vision_start|>")

    @classmethod
    def from_resolution(
        cls, tokenizer: PreTrainedTokenizerBase, resolution: ResolutionSettings, **options: Any
    ) -> Self:
        """A processor with the budgets of a recipe; ``options`` as for the class."""
        return cls(KeyeImageProcessor.from_resolution(resolution), tokenizer, video=video_limits(resolution), **options)

    @property
    def resolution(self) -> ResolutionSettings:
        """The budgets of images and videos, in tokens."""
        return self.image_processor.resolution(with_video_limits(ResolutionSettings(), self.video))

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call may return and ``forward`` takes."""
        videos = ["pixel_values_videos", "video_grid_thw", "second_per_grid_ts"]
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names, *videos]

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: Any = None, **kwargs: Any
    ) -> list[Any]:
        # The published folder names classes that are code of that folder; ours are loaded instead of them.
        kwargs.pop("trust_remote_code", None)
        of_images = {name: kwargs[name] for name in _FILES | set(ImageOptions.__annotations__) if name in kwargs}
        of_tokenizer = {name: kwargs[name] for name in kwargs if name in _FILES or name not in {*of_images, *_OWN}}
        images = KeyeImageProcessor.from_pretrained(pretrained_model_name_or_path, **of_images)
        tokenizer = AutoTokenizer.from_pretrained(
            pretrained_model_name_or_path, trust_remote_code=False, **of_tokenizer
        )
        return [images, tokenizer]

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The second half of ``from_pretrained``: limits in ``video`` replace those of the folder one by one."""
        if kwargs.get("video") is not None:
            kwargs["video"] = {**(processor_dict.get("video") or {}), **kwargs["video"]}
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Write the files that the published folder has, and ``processor_config.json`` with the limits of videos.

        The tokenizer keeps its own chat template, apart from the processor's.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer._set_processor_class(type(self).__name__)
        self.tokenizer.save_pretrained(folder, save_jinja_files=False)
        self.image_processor.save_pretrained(folder)
        fields = processor_fields(self.video) | {"processor_class": type(self).__name__}
        written = {**template_file(self.chat_template), PROCESSOR: fields}
        for name, content in written.items():
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        return [str(folder / name) for name in written]

    def _token_id(self, token: str) -> int:
        found = self.tokenizer.convert_tokens_to_ids(token)
        if not isinstance(found, int) or self.tokenizer.convert_ids_to_tokens(found) != token:
            raise ValueError(f"the tokenizer has no {token}: use one with the special tokens of Keye")
        return found
