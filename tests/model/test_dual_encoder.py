"""Promises: Stage 0 is SigLIP, on packed images; pooling stays within each image."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from keye_train.model import (
    ContrastiveInputs,
    DualEncoder,
    KeyeConfig,
    VisionInputs,
    module_parameters,
    siglip_loss,
)
from keye_train.settings import TextTowerSettings

GRIDS = torch.tensor([[1, 2, 4], [1, 4, 4], [1, 2, 2]])
TEXT = TextTowerSettings(
    vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=3, max_tokens=6
)


def small_config() -> KeyeConfig:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 56,
    }
    return KeyeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]},
        vision_config=vision,
    )


def build() -> DualEncoder:
    torch.manual_seed(0)
    return DualEncoder(small_config(), TEXT)


def pairs(grids: Tensor = GRIDS) -> ContrastiveInputs:
    generator = torch.Generator().manual_seed(1)
    patches = torch.randint(0, 256, (int(grids.prod(1).sum()), 3, 14, 14), dtype=torch.uint8, generator=generator)
    text_ids = torch.randint(0, TEXT.vocab_size, (len(grids), TEXT.max_tokens), generator=generator)
    return ContrastiveInputs(VisionInputs.build(patches, grids), text_ids)


def test_starts_at_the_papers_temperature_and_bias() -> None:
    output = build()(pairs())
    assert output.logit_scale.item() == pytest.approx(math.log(10))
    assert output.logit_bias.item() == -10
    assert torch.allclose(output.image_embeds.norm(dim=1), torch.ones(3))
    assert torch.allclose(output.text_embeds.norm(dim=1), torch.ones(3))


def test_a_pack_equals_its_pairs_one_by_one() -> None:
    model, inputs = build(), pairs()
    packed = model(inputs)
    borders = inputs.vision.cu_seqlens.tolist()
    for number, (start, stop) in enumerate(pairwise(borders)):
        one = VisionInputs.build(inputs.vision.pixel_patches[start:stop], GRIDS[number : number + 1])
        single = model(ContrastiveInputs(one, inputs.text_ids[number : number + 1]))
        assert torch.allclose(packed.image_embeds[number], single.image_embeds[0], atol=1e-6)
        assert torch.allclose(packed.text_embeds[number], single.text_embeds[0], atol=1e-6)


def test_pooling_equals_torch_attention() -> None:
    """Against ``nn.MultiheadAttention``, whose parameters have the same names."""
    model, inputs = build(), pairs()
    head = model.visual.vision_model.head
    reference = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    reference.load_state_dict(head.attention.state_dict())
    hidden = model.visual(inputs.vision)
    pooled = model.visual.pool(hidden, inputs.vision)
    for number, segment in enumerate(hidden.split(inputs.vision.cu_seqlens.diff().tolist())):
        expected = reference(head.probe, segment[None], segment[None])[0][0, 0]
        expected = expected + head.mlp(head.layernorm(expected))
        assert torch.allclose(pooled[number], expected, atol=1e-6)


def test_every_trainable_parameter_gets_a_gradient() -> None:
    model = build()
    siglip_loss(*model(pairs())[:4]).sum().backward()
    modules = module_parameters(model)
    assert set(modules) == {"vision", "text_tower"}
    for name, parameter in (pair for group in modules.values() for pair in group):
        assert parameter.grad is not None, name
        # A bias of the keys shifts all scores of a query alike: its gradient is exactly zero in theory.
        assert parameter.grad.any() or "k_proj.bias" in name, name
    assert any(".head." in name for name, _ in modules["vision"])
