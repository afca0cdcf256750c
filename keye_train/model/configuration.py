"""Configurations with the fields of the published ``config.json``, read and written as they stand there."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from keye_train.settings import ModelSettings


class SpecialToken(NamedTuple):
    """A control token as the tokenizer writes it, and the field of config.json that holds its id."""

    text: str
    field: str | None  # None: config.json has none


# Field of model.special_tokens -> token
SPECIAL_TOKENS = {
    "bos": SpecialToken("<|endoftext|>", "bos_token_id"),
    "eos": SpecialToken("<|im_end|>", "eos_token_id"),
    "pad": SpecialToken("<|endoftext|>", None),
    "vision_start": SpecialToken("<|vision_start|>", "vision_start_token_id"),
    "vision_end": SpecialToken("<|vision_end|>", "vision_end_token_id"),
    "vision_pad": SpecialToken("<|vision_pad|>", "vision_token_id"),
    "image_pad": SpecialToken("<|image_pad|>", "image_token_id"),
    "video_pad": SpecialToken("<|video_pad|>", "video_token_id"),
}


class KeyeVisionConfig(PretrainedConfig):
    """Shape of the vision tower (SigLIP so400m with 2-D RoPE)."""

    model_type = "siglip_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 384
    patch_size: int = 14
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    spatial_merge_size: int = 2
    tokens_per_second: int = 2
    temporal_patch_size: int = 2  # written for the published code, which does not use it either

    @property
    def table_side(self) -> int:
        """Rows (and columns) of the learned position table."""
        return self.image_size // self.patch_size


class KeyeConfig(PretrainedConfig):
    """Shape of the whole model; the defaults are those of Keye-VL-8B-Preview.

    The rotary fields keep their published names: ``rope_theta``, and ``rope_scaling`` with ``mrope_section``, the
    number of frequencies that follow time, height and width.
    """

    model_type = "Keye"
    sub_configs = {"vision_config": KeyeVisionConfig}  # noqa: RUF012 (a class attribute that transformers reads)
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 40960
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_theta: float = 1_000_000.0
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 36
    bos_token_id: int | None = 151643
    eos_token_id: int | None = 151645
    pad_token_id: int | None = None
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    vision_token_id: int = 151654
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_config: KeyeVisionConfig | dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, KeyeVisionConfig):
            self.vision_config = KeyeVisionConfig(**(self.vision_config or {}))
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.rope_scaling is None:
            quarter = self.head_dim // 8  # the published shares 16 : 24 : 24 of 64
            rest = self.head_dim // 2 - quarter
            self.rope_scaling = {"type": "mrope", "mrope_section": [quarter, rest // 2, rest - rest // 2]}
        if self.use_sliding_window:
            raise ValueError("use_sliding_window=true is not supported: Keye attends to the whole sample")
        super().__post_init__(**kwargs)

    @property
    def vision(self) -> KeyeVisionConfig:
        """``vision_config``, typed."""
        assert isinstance(self.vision_config, KeyeVisionConfig)
        return self.vision_config

    @property
    def mrope_section(self) -> list[int]:
        """Rotary frequencies of time, height and width; they sum to head_dim / 2."""
        assert self.rope_scaling is not None
        return list(self.rope_scaling["mrope_section"])

    @property
    def attention_head_dim(self) -> int:
        """``head_dim``, which is never null once the configuration exists."""
        assert self.head_dim is not None
        return self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """All fields; the data type under its published name ``torch_dtype``, and of the tower only its shape."""
        fields = super().to_dict()
        dtype = fields.pop("dtype", None)
        if dtype is not None:
            fields["torch_dtype"] = dtype
        if isinstance(vision := fields.get("vision_config"), dict):
            own = ("model_type", *KeyeVisionConfig.__annotations__)
            fields["vision_config"] = {name: vision[name] for name in own if name in vision}
        return fields


def keye_config(settings: ModelSettings) -> KeyeConfig:
    """Configuration of the model that a recipe describes."""
    language = asdict(settings.language)  # fields of the same names, but for one
    section = language.pop("mrope_section")
    tokens = {
        token.field: getattr(settings.special_tokens, name) for name, token in SPECIAL_TOKENS.items() if token.field
    }
    return KeyeConfig(
        architectures=["KeyeForConditionalGeneration"],
        max_window_layers=settings.language.num_hidden_layers,
        rope_scaling={"type": "mrope", "mrope_section": section},
        vision_config=KeyeVisionConfig(**asdict(settings.vision)),
        **language,
        **tokens,
    )
