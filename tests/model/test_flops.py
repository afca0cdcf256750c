"""Promise: the cost formula counts the matrix products that really run, forward and backward, whatever is frozen."""

from __future__ import annotations

import golden
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from keye_train.model import module_parameters
from keye_train.model.flops import TOWERS, FlopCoefficients, pack_flops


def upper_triangle(lengths: torch.Tensor) -> float:
    """Pairs that the kernel of these tests computes and the formula does not count: queries and later keys."""
    return float((lengths * (lengths - 1) / 2).sum())


@pytest.mark.parametrize("samples", [("text",), ("image",), ("video",), golden.SAMPLES])
def test_a_forward_equals_the_counted_operations(samples: tuple[str, ...]) -> None:
    model = golden.tiny_model()
    inputs = golden.pack(samples, model.config)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.forward_packed(inputs)
    lengths, cost = inputs.cu_seqlens.diff(), FlopCoefficients.of(model.config)
    # A pack without vision runs a placeholder of four patches, which is no work of the pack.
    vision_lengths = inputs.vision.cu_seqlens.diff().tolist()
    placeholder = 0.0 if vision_lengths else float(cost.vision([4]).sum())
    formula = pack_flops(model.config, lengths.tolist(), vision_lengths, len(inputs.loss_rows))
    executed = formula + cost.language_pair * upper_triangle(lengths) + placeholder
    assert counter.get_total_flops() == pytest.approx(executed, rel=1e-9)


@pytest.mark.parametrize(
    "trainable",
    [TOWERS, ("projector",), ("vision",), ("language",), ("projector", "language"), ("vision", "projector")],
)
def test_a_step_equals_the_counted_operations(trainable: tuple[str, ...]) -> None:
    model = golden.tiny_model().requires_grad_(False)
    for tower in trainable:
        for _, parameter in module_parameters(model)[tower]:
            parameter.requires_grad_(True)
    inputs = golden.pack(golden.SAMPLES, model.config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.forward_packed(inputs).sum().backward()
    forward = FlopCoefficients.of(model.config)
    cost = forward.for_training(trainable)
    lengths, labelled = inputs.cu_seqlens.diff(), len(inputs.loss_rows)
    formula = cost.pack(lengths.tolist(), inputs.vision.cu_seqlens.diff().tolist(), labelled)
    logits_again = forward.labelled_token * labelled  # formed in the backward a second time, to save memory
    executed = formula + cost.language_pair * upper_triangle(lengths) + logits_again
    assert counter.get_total_flops() == pytest.approx(executed, rel=1e-9)


def test_longer_samples_cost_more_per_token() -> None:
    config = golden.tiny_model().config
    assert pack_flops(config, [1024], []) > pack_flops(config, [512, 512], [])
    assert pack_flops(config, [], [4096]) > pack_flops(config, [], [1024] * 4)
    assert pack_flops(config, [], []) == 0
