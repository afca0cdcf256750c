"""Small SigLIP and Qwen3 checkpoints as transformers writes them, and the recipe of the Keye that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from toy_inputs import CONTROL_TOKENS, toy_tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipConfig, SiglipModel

from keye_train.model import VisionInputs
from keye_train.settings import (
    LanguageModelSettings,
    ModelSettings,
    SpecialTokenSettings,
    StartWeightsSettings,
    TextTowerSettings,
    VisionTowerSettings,
)

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIDE = 4  # patches along the native square
LANGUAGE = {
    "vocab_size": 400,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
ROPE_THETA = 5000.0


def spread(model: nn.Module) -> nn.Module:
    """Weights far enough from their first values that every one of them, bias and norm too, shows in the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def write_siglip(folder: Path) -> Path:
    text = TOWER | {"vocab_size": 40, "max_position_embeddings": 6, "projection_size": 32}
    text |= {"bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(1)
    vision = TOWER | {"image_size": 14 * SIDE, "patch_size": 14}
    spread(SiglipModel(SiglipConfig(text_config=text, vision_config=vision))).save_pretrained(folder)
    return folder


def write_qwen3(folder: Path, tied: bool, **options: Any) -> Path:
    config = Qwen3Config(**LANGUAGE, tie_word_embeddings=tied, rope_parameters={"rope_theta": ROPE_THETA, **options})
    torch.manual_seed(2)
    spread(Qwen3ForCausalLM(config)).save_pretrained(folder)
    return folder


def recipe(**start: Any) -> ModelSettings:
    """The recipe of the same model, for the trainer."""
    ids = {name.strip("<|>"): toy_tokenizer().convert_tokens_to_ids(name) for name in CONTROL_TOKENS}
    tied = start.pop("tied", False)
    return ModelSettings(
        name="small",
        tokenizer="",
        vision=VisionTowerSettings(**TOWER, image_size=14 * SIDE),
        language=LanguageModelSettings(
            **LANGUAGE,
            max_position_embeddings=32768,
            rope_theta=ROPE_THETA,
            mrope_section=[1, 1, 2],
            tie_word_embeddings=tied,
        ),
        special_tokens=SpecialTokenSettings(
            bos=ids["endoftext"],
            eos=ids["im_end"],
            pad=ids["endoftext"],
            **{name: ids[name] for name in ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")},
        ),
        text_tower=TextTowerSettings(40, **TOWER, max_tokens=6),
        start=StartWeightsSettings(**start),
    )


def pictures(count: int) -> tuple[Tensor, VisionInputs]:
    """Images of the native size as SigLIP reads them, [count, 3, 56, 56], and as Keye does."""
    images = torch.rand(count, 3, 14 * SIDE, 14 * SIDE) * 2 - 1
    patches = images.unflatten(3, (SIDE, 14)).unflatten(2, (SIDE, 14)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    return images, VisionInputs.build(patches, torch.tensor([[1, SIDE, SIDE]] * count))
