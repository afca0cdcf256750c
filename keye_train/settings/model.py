"""The model: its shape, its tokenizer and its first weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from keye_train.settings.basics import SettingsError


@dataclass
class VisionTowerSettings:
    """Shape of the SigLIP vision tower."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 384
    """Side in pixels of the square image that the learned position table belongs to: (384 // 14)^2 = 729 places."""


@dataclass
class LanguageModelSettings:
    """Shape of the Qwen3 language model."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 40960
    rope_theta: float = 1_000_000.0
    mrope_section: list[int] = field(default_factory=lambda: [16, 24, 24])
    """Rotary frequencies given to time, height and width; they sum to head_dim / 2."""
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02


@dataclass
class SpecialTokenSettings:
    """Ids of the special tokens; they are checked against the tokenizer when it is loaded."""

    bos: int = 151643
    eos: int = 151645
    pad: int = 151643
    vision_start: int = 151652
    vision_end: int = 151653
    vision_pad: int = 151654
    image_pad: int = 151655
    video_pad: int = 151656


@dataclass
class TextTowerSettings:
    """Shape of the SigLIP text tower, which only Stage 0 uses."""

    vocab_size: int = 32000
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    max_tokens: int = 64
    tokenizer: str | None = None
    """Folder of the text tower's tokenizer; null: the tokenizer of the language model."""


@dataclass
class CaptionDecoderSettings:
    """Shape of the small language model that reads captions in Stage 0 where ``stage.caption_weight`` is not 0.

    It has a projector of its own and the vocabulary of the text tower.
    """

    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    num_key_value_heads: int = 12
    rope_theta: float = 10_000.0
    initializer_range: float = 0.02


@dataclass
class StartWeightsSettings:
    """Where the first weights come from when a stage has no parent."""

    siglip: str | None = None
    """Folder in the layout of google/siglip-so400m-patch14-384."""
    qwen3: str | None = None
    """Folder in the layout of Qwen/Qwen3-8B."""
    random: bool = False
    """Allow random weights for every part that has no source. Only toy models learn from nothing."""


@dataclass
class ModelSettings:
    """The model: its shape, its tokenizer and its first weights."""

    name: str
    tokenizer: str
    """Folder with tokenizer.json and tokenizer_config.json."""
    vision: VisionTowerSettings = field(default_factory=VisionTowerSettings)
    language: LanguageModelSettings = field(default_factory=LanguageModelSettings)
    special_tokens: SpecialTokenSettings = field(default_factory=SpecialTokenSettings)
    text_tower: TextTowerSettings = field(default_factory=TextTowerSettings)
    caption_decoder: CaptionDecoderSettings = field(default_factory=CaptionDecoderSettings)
    start: StartWeightsSettings = field(default_factory=StartWeightsSettings)


def check_model(model: ModelSettings) -> None:
    """Raise SettingsError for values that cannot work together."""
    language, vision, text = model.language, model.vision, model.text_tower
    if sum(language.mrope_section) * 2 != language.head_dim:
        raise SettingsError(
            f"model.language.mrope_section={language.mrope_section} must sum to head_dim / 2 = {language.head_dim // 2}"
        )
    if language.num_attention_heads % language.num_key_value_heads:
        raise SettingsError(
            f"model.language.num_attention_heads={language.num_attention_heads} must be a multiple of "
            f"num_key_value_heads={language.num_key_value_heads}"
        )
    if vision.hidden_size % (vision.num_attention_heads * 4):
        raise SettingsError(
            f"model.vision.hidden_size={vision.hidden_size} must be a multiple of 4 x num_attention_heads="
            f"{vision.num_attention_heads * 4}: 2D RoPE splits each head into row and column pairs"
        )
    decoder = model.caption_decoder
    if decoder.hidden_size % (8 * decoder.num_attention_heads):  # head widths in eighths: the three axes of RoPE
        raise SettingsError(
            f"model.caption_decoder.hidden_size={decoder.hidden_size} must be a multiple of 8 * num_attention_heads="
            f"{8 * decoder.num_attention_heads}"
        )
    if decoder.num_attention_heads % decoder.num_key_value_heads:
        raise SettingsError(
            f"model.caption_decoder.num_attention_heads={decoder.num_attention_heads} must be a multiple of "
            f"num_key_value_heads={decoder.num_key_value_heads}"
        )
    if text.hidden_size % text.num_attention_heads:
        raise SettingsError(
            f"model.text_tower.hidden_size={text.hidden_size} must be a multiple of num_attention_heads="
            f"{text.num_attention_heads}"
        )
    for name, token_id in vars(model.special_tokens).items():
        if not 0 <= token_id < language.vocab_size:
            raise SettingsError(
                f"model.special_tokens.{name}={token_id} is outside model.language.vocab_size={language.vocab_size}"
            )
