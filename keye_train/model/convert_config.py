"""Configurations on the way in and out: Keye's from those of SigLIP and Qwen3, SigLIP's from Keye's.

Whatever the sources compute and Keye does not is refused here, by the name of the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import Qwen3Config, SiglipConfig, SiglipTextConfig, SiglipVisionConfig

from keye_train.model.configuration import SPECIAL_TOKENS, KeyeConfig, KeyeVisionConfig
from keye_train.model.positions import PATCH_SIZE
from keye_train.model.processor_files import (
    PREPROCESSOR,
    PUBLISHED_PREPROCESSOR,
    budget_files,
    stored_files,
    template_file,
)
from keye_train.runs import read_json
from keye_train.settings import LanguageModelSettings, ResolutionSettings, VisionTowerSettings

_TOWER = tuple(field.name for field in fields(VisionTowerSettings))
_LANGUAGE = tuple(
    field.name for field in fields(LanguageModelSettings) if field.name not in ("mrope_section", "rope_theta")
)
# What SigLIP and Qwen3 call as Keye does: the shape, which a recipe sets as well, and what is fixed
VISION_FIELDS = (*_TOWER, "num_channels", "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout")
LANGUAGE_FIELDS = (*_LANGUAGE, "hidden_act")

PUBLISHED_SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}


def keye_from_sources(siglip: Path, qwen3: Path, tokenizer: Path, untie: bool = False) -> KeyeConfig:
    """Keye's configuration on a SigLIP tower and a Qwen3 of any size.

    Args:
        siglip, qwen3: checkpoint folders, with config.json.
        tokenizer: folder whose tokenizer.json has Keye's vision tokens.
        untie: give Keye an output matrix of its own where Qwen3 has none.

    Raises:
        FileNotFoundError: a config.json or tokenizer.json is absent.
        ValueError: another kind of model, or a field that Keye cannot follow; the message names file and field.
    """
    vision, language = _vision_config(siglip), _qwen3_config(qwen3)
    values: dict[str, Any] = {name: getattr(language, name) for name in LANGUAGE_FIELDS}
    if untie:
        values["tie_word_embeddings"] = False
    tokens = special_token_ids(tokenizer)
    largest = max(tokens.values())
    if largest >= language.vocab_size:
        raise ValueError(
            f"{tokenizer / 'tokenizer.json'} has the id {largest}, but {qwen3} has {language.vocab_size} embeddings: "
            "choose the tokenizer that belongs to it"
        )
    values |= tokens
    return KeyeConfig(
        architectures=["KeyeForConditionalGeneration"],
        vision_config=vision,
        max_window_layers=language.num_hidden_layers,
        rope_theta=float(dict(language.rope_parameters or {})["rope_theta"]),
        **values,
    )


def special_token_ids(tokenizer: Path) -> dict[str, int]:
    """Ids of the tokens that config.json names, from tokenizer.json.

    Raises:
        FileNotFoundError: no tokenizer.json.
        ValueError: a token is missing.
    """
    path = tokenizer / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is absent: name the folder of Keye's tokenizer with --tokenizer")
    added = {token["content"]: token["id"] for token in read_json(path).get("added_tokens", [])}
    found = {}
    for token, name in SPECIAL_TOKENS.values():
        if token not in added:
            raise ValueError(f"{path} has no token {token}: name the folder of Keye's tokenizer with --tokenizer")
        if name is not None:
            found[name] = added[token]
    return found


def published_files(folder: Path, config: KeyeConfig) -> dict[str, Path | dict[str, Any]]:
    """Files beside the weights from a folder; the two that the published layout needs are made where they lack."""
    return {PREPROCESSOR: dict(PUBLISHED_PREPROCESSOR), **_sampling(config), **stored_files(folder)}


def start_files(
    tokenizer: Path, config: KeyeConfig, resolution: ResolutionSettings | None
) -> dict[str, Path | dict[str, Any]]:
    """Files beside the weights of a model before its training.

    Args:
        tokenizer: folder of the tokenizer.
        config: of the model.
        resolution: budgets; None: those in the tokenizer's folder, or of the first report where it has none.
    """
    budgets = budget_files(resolution or ResolutionSettings())
    stored = stored_files(tokenizer)
    files = {**template_file(), **_sampling(config), **budgets, **stored}
    return files if resolution is None else {**files, **budgets}


def _sampling(config: KeyeConfig) -> dict[str, dict[str, Any]]:
    tokens = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": [config.eos_token_id, config.bos_token_id],
        "pad_token_id": config.bos_token_id,  # Keye pads with <|endoftext|>, which is its bos token as well
    }
    return {"generation_config.json": PUBLISHED_SAMPLING | tokens}


def siglip_from_keye(vision: KeyeVisionConfig) -> SiglipVisionConfig:
    """The tower's shape as transformers' SigLIP describes it."""
    return SiglipVisionConfig(**{name: getattr(vision, name) for name in VISION_FIELDS})


def siglip_from_towers(config: KeyeConfig) -> SiglipConfig:
    """Both towers of a Stage 0 export."""
    text = config.text_tower
    return SiglipConfig(
        vision_config=siglip_from_keye(config.vision).to_dict(),
        text_config=SiglipTextConfig(
            vocab_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            num_hidden_layers=text["num_hidden_layers"],
            num_attention_heads=text["num_attention_heads"],
            max_position_embeddings=text["max_tokens"],
            projection_size=config.vision.hidden_size,
            bos_token_id=None,
            eos_token_id=None,
        ).to_dict(),
    )


def _vision_config(folder: Path) -> KeyeVisionConfig:
    path, stored = _read(folder)
    kind = stored.get("model_type")
    if kind == "siglip":
        stored = stored.get("vision_config") or {}
    elif kind != "siglip_vision_model":
        raise ValueError(f"{path} describes a model of type {kind}, not SigLIP: check --siglip")
    theirs = SiglipVisionConfig(**{name: value for name, value in stored.items() if name in VISION_FIELDS})
    required = {
        "patch_size": PATCH_SIZE,
        "num_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "attention_dropout": 0.0,
    }
    _require(path, theirs, required)
    if stored.get("vision_use_head") is False:
        raise ValueError(f"{path} has vision_use_head=false: Keye's layout has the pooling head, take a whole SigLIP")
    if theirs.hidden_size % (4 * theirs.num_attention_heads):
        raise ValueError(
            f"{path} has hidden_size={theirs.hidden_size} and num_attention_heads={theirs.num_attention_heads}: 2-D "
            "rotary positions need heads whose width is a multiple of 4"
        )
    return KeyeVisionConfig(**{name: getattr(theirs, name) for name in VISION_FIELDS})


def _qwen3_config(folder: Path) -> Qwen3Config:
    path, stored = _read(folder)
    if stored.get("model_type") != "qwen3":
        raise ValueError(f"{path} describes a model of type {stored.get('model_type')}, not qwen3: check --qwen3")
    config = Qwen3Config(**stored)
    required = {
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
    }
    _require(path, config, required)
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"{path} stretches positions (rope_type={rope['rope_type']}): Keye starts from plain RoPE")
    if config.head_dim % 8:
        raise ValueError(f"{path} has head_dim={config.head_dim}: three rotary sections need a multiple of 8")
    return config


def _read(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is absent: name the folder of a whole checkpoint")
    return path, read_json(path)


def _require(path: Path, config: Any, required: Mapping[str, Any]) -> None:
    for name, value in required.items():
        if getattr(config, name) != value:
            raise ValueError(f"{path} has {name}={getattr(config, name)}: Keye has {value}")
