"""From settings to what the trainer runs: plan of the data, encoder of samples, model with its first weights,
frozen parts, objective."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from keye_train import runs
from keye_train.data.cost import training_cost
from keye_train.data.index import tokenizer_fingerprint
from keye_train.data.plan import Plan
from keye_train.model import (
    KeyeForConditionalGeneration,
    compile_layers,
    enable_activation_checkpointing,
    keye_config,
    module_parameters,
)
from keye_train.model.dual_encoder import DualEncoder
from keye_train.model.sample_encoder import SampleEncoder
from keye_train.model.start import initial_dual_encoder, initial_model
from keye_train.settings import ActivationCheckpointing, Objective, SettingsError, StageSettings, TrainSettings
from keye_train.training.objectives import ContrastiveObjective, LanguageObjective, TrainingObjective

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"

# Fields of config.json that change what the model computes without changing a shape -> their setting.
SILENT_FIELDS = {
    "num_attention_heads": "model.language.num_attention_heads",
    "num_key_value_heads": "model.language.num_key_value_heads",
    "head_dim": "model.language.head_dim",
    "rope_theta": "model.language.rope_theta",
    "rope_scaling": "model.language.mrope_section",
    "rms_norm_eps": "model.language.rms_norm_eps",
    "tie_word_embeddings": "model.language.tie_word_embeddings",
    "vision_start_token_id": "model.special_tokens.vision_start",
    "vision_end_token_id": "model.special_tokens.vision_end",
    "image_token_id": "model.special_tokens.image_pad",
    "video_token_id": "model.special_tokens.video_pad",
}


def build_plan(settings: TrainSettings, world_size: int) -> Plan:
    """The plan of the data of a run.

    Raises:
        SettingsError: so many ranks cannot share its global batches.
        ValueError: data do not fit the recipe.
    """
    settings.gradient_accumulation(world_size)  # refuses a world size that does not divide the global batch
    plan = Plan.from_settings(settings, training_cost(settings))
    plan.check_world_size(world_size)
    return plan


def build_encoder(settings: TrainSettings) -> SampleEncoder:
    """What makes tensors of the samples of a run."""
    data = settings.data
    return SampleEncoder.from_settings(settings.model, data.resolution, data.video_backend, data.scaled_jpeg)


def build_objective(settings: TrainSettings) -> TrainingObjective:
    """The module to train: on the CPU, fp32, with its first weights, everything frozen that the stage does not train.

    The same on every rank: weights come from files or from a generator seeded with ``settings.seed``.

    Raises:
        SettingsError: the stage cannot start from this parent.
        ValueError, FileNotFoundError: the parent or a source of start weights does not fit; the message says where.
    """
    stage, precision = settings.stage, settings.deepspeed.precision
    objective: TrainingObjective
    if stage.objective == Objective.contrastive:
        if settings.parent is not None:
            raise SettingsError(f"parent={settings.parent}: {stage.name} starts from model.start; drop parent")
        objective = ContrastiveObjective(
            initial_dual_encoder(settings.model, settings.seed, captions=settings.stage.caption_weight > 0),
            precision,
            settings.stage.caption_weight,
        )
    else:
        parent = None if settings.parent is None else runs.export_dir(settings.parent, "parent")
        if parent is not None:
            check_parent(parent, settings)
        objective = LanguageObjective(initial_model(settings.model, settings.seed, parent), precision)
    freeze(objective.model, stage)
    if stage.activation_checkpointing != ActivationCheckpointing.none:
        selective = stage.activation_checkpointing == ActivationCheckpointing.selective
        enable_activation_checkpointing(objective.model, selective)
    if stage.compile_layers:
        compile_layers(objective.model)
    return objective.train()


def check_parent(parent: Path, settings: TrainSettings) -> None:
    """Refuse a parent that would load but mean something else: other heads, positions or tokens.

    Shapes are checked when the tensors are read. The export of a contrastive stage gives its vision tower only.

    Raises:
        ValueError: names the setting and both values.
    """
    theirs, ours = runs.read_json(parent / "config.json"), keye_config(settings.model).to_dict()
    if "vision_config" not in theirs:
        raise ValueError(f"parent {parent} is not a Keye export: its config.json has no vision_config")
    vision_theirs, vision_ours = theirs["vision_config"], ours["vision_config"]
    if vision_theirs["num_attention_heads"] != vision_ours["num_attention_heads"]:
        raise ValueError(
            f"parent {parent} has model.vision.num_attention_heads={vision_theirs['num_attention_heads']}, this recipe "
            f"{vision_ours['num_attention_heads']}"
        )
    if theirs.get("architectures") == [DualEncoder.__name__]:
        return
    for field, setting in SILENT_FIELDS.items():
        if theirs.get(field) != ours.get(field):
            raise ValueError(
                f"parent {parent} has {field}={theirs.get(field)} in config.json, this recipe {ours.get(field)}: "
                f"set {setting} as the parent has it, or choose another parent"
            )
    if (parent / TOKENIZER_FILE).exists():
        wanted = tokenizer_fingerprint(settings.model.tokenizer)
        if tokenizer_fingerprint(parent) != wanted:
            raise ValueError(
                f"parent {parent} was trained with another {TOKENIZER_FILE} than model.tokenizer="
                f"{settings.model.tokenizer}: its token ids mean other things. Set model.tokenizer={parent}"
            )


def freeze(model: nn.Module, stage: StageSettings) -> None:
    """Let only the parameters of ``stage.trainable`` require a gradient."""
    modules = module_parameters(model)
    missing = [name for name in stage.trainable if name not in modules]
    assert not missing, f"settings let through modules that the model does not have: {missing}"
    model.requires_grad_(False)
    for name in stage.trainable:
        for _, parameter in modules[name]:
            parameter.requires_grad_(True)


def meta_model(settings: TrainSettings) -> nn.Module:
    """The model of a stage, frozen as the stage has it, without weights: any model can be counted anywhere."""
    with torch.device("meta"):
        config = keye_config(settings.model)
        model: nn.Module
        if settings.stage.objective == Objective.contrastive:
            decoder = settings.model.caption_decoder if settings.stage.caption_weight else None
            model = DualEncoder(config, settings.model.text_tower, decoder)
        else:
            model = KeyeForConditionalGeneration(config)
    freeze(model, settings.stage)
    return model


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """Parameters that a stage trains and freezes, by module; ``other``: what no objective of the stage reaches.

    Before the engine partitions the model: shapes are gone afterwards.

    Returns:
        ``{"trainable": {module: count}, "frozen": {module: count}}``.
    """
    counts: dict[str, dict[str, int]] = {"trainable": {}, "frozen": {}}
    listed = set()
    for module, parameters in module_parameters(model).items():
        for _, parameter in parameters:
            kind = counts["trainable" if parameter.requires_grad else "frozen"]
            kind[module] = kind.get(module, 0) + parameter.numel()
            listed.add(id(parameter))
    rest = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in listed)
    if rest:
        counts["frozen"]["other"] = rest
    return counts


def log_parameters(counts: Mapping[str, Mapping[str, int]]) -> None:
    """Say what trains and what is frozen."""
    for kind, modules in counts.items():
        listed = ", ".join(f"{module} {count:,}" for module, count in modules.items()) or "nothing"
        logger.info("%s parameters: %s", kind, listed)
