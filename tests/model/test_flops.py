"""Promise: the cost formula counts the matrix products that really run."""

from __future__ import annotations

import golden
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from keye_train.model.flops import FlopCoefficients, pack_flops


@pytest.mark.parametrize("samples", [("image",), golden.SAMPLES])
def test_equal_to_the_counted_operations(samples: tuple[str, ...]) -> None:
    model = golden.tiny_model()
    inputs = golden.pack(samples, model.config)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.forward_packed(inputs)
    lengths = inputs.cu_seqlens.diff().numpy()
    formula = pack_flops(model.config, lengths, inputs.vision.cu_seqlens.diff().numpy(), len(inputs.loss_rows))
    # This kernel computes the upper triangle of the causal products too, which the formula does not count.
    upper = FlopCoefficients.of(model.config).language_pair * float((lengths * (lengths - 1) / 2).sum())
    assert counter.get_total_flops() == pytest.approx(formula + upper, rel=1e-9)


def test_longer_samples_cost_more_per_token() -> None:
    config = golden.tiny_model().config
    assert pack_flops(config, [1024], []) > pack_flops(config, [512, 512], [])
    assert pack_flops(config, [], [4096]) > pack_flops(config, [], [1024] * 4)
    assert pack_flops(config, [], []) == 0
