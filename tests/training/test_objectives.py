"""Every pack runs the whole model and gives every trained parameter a gradient, even a pack that holds nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from corpus import ToyCorpus

from keye_train.data.collate import collate_pairs, collate_samples
from keye_train.settings import Precision
from keye_train.training.build import build_objective
from keye_train.training.trainer import weighted_sum

CAPTIONS = ("stage.caption_weight=2", "stage.trainable=[vision,text_tower,caption_decoder]")


@pytest.mark.parametrize(("stage", "more"), [("0_vision", ()), ("0_vision", CAPTIONS), ("2_multitask", ())])
def test_an_empty_pack_gives_zero_gradients_everywhere(
    toy_corpus: ToyCorpus, tmp_path: Path, stage: str, more: tuple[str, ...]
) -> None:
    recipe = toy_corpus.settings(stage, tmp_path, *more)
    objective = build_objective(recipe)
    empty = collate_pairs([], recipe.model) if stage == "0_vision" else collate_samples([], recipe.model)
    losses, figures = objective(empty)
    assert losses.shape == (0,)
    assert all(float(value) == 0 for value in figures.values())
    weighted_sum(losses, 1.0).backward()
    gradients = {name: p.grad for name, p in objective.model.named_parameters() if p.requires_grad}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert all(not gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("stage", ["0_vision", "2_multitask"])
def test_autocast_multiplies_in_bf16_and_keeps_losses_in_fp32(
    toy_corpus: ToyCorpus, tmp_path: Path, stage: str
) -> None:
    recipe = toy_corpus.settings(stage, tmp_path)
    recipe.deepspeed.precision = Precision.bf16_autocast
    objective = build_objective(recipe)
    seen = set()
    for module in objective.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    empty = collate_pairs([], recipe.model) if stage == "0_vision" else collate_samples([], recipe.model)
    losses, _ = objective(empty)
    assert torch.bfloat16 in seen
    assert losses.dtype == torch.float32
