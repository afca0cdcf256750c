"""Every pack runs the whole model and gives every trained parameter a gradient, even a pack that holds nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from corpus import ToyCorpus

from keye_train.data.collate import collate_pairs, collate_samples
from keye_train.settings import LossWeighting, Precision
from keye_train.training.build import build_objective
from keye_train.training.learner import weighted_sum
from keye_train.training.objectives import WEIGHT_UNITS, item_weights, total_weight

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


class TestLossWeighting:
    """Labelled tokens of 3 samples with 1, 4 and 9 tokens, over two packs."""

    packs = (torch.tensor([0, 2, 2, 2, 2]), torch.tensor([1] * 9))  # sample 0 and 1 of either pack may have no label

    @pytest.mark.parametrize(
        ("weighting", "expected", "total"),
        [("per_sample", [1.0, 1 / 4, 1 / 9], 3.0), ("square", [1.0, 1 / 2, 1 / 3], 6.0)],
    )
    def test_weights_are_of_the_sample_and_their_sum_is_known_before(
        self, weighting: str, expected: list[float], total: float
    ) -> None:
        weights = [item_weights(pack, LossWeighting(weighting)) for pack in self.packs]
        assert all(weight is not None for weight in weights)
        assert [w[-1].item() for w in (weights[0][:1], *weights)] == pytest.approx(expected)  # type: ignore[index]
        assert sum(total_weight(pack, LossWeighting(weighting)) for pack in self.packs) == int(total * WEIGHT_UNITS)
        assert sum(float(weight.sum()) for weight in weights) == pytest.approx(total)  # type: ignore[union-attr]

    def test_per_token_is_the_plain_sum(self) -> None:
        assert item_weights(self.packs[0], LossWeighting.per_token) is None
        assert total_weight(self.packs[0], LossWeighting.per_token) == 5 * WEIGHT_UNITS

    def test_a_pack_without_labels_weighs_nothing(self) -> None:
        nothing = torch.empty(0, dtype=torch.int64)
        for weighting in LossWeighting:
            assert total_weight(nothing, weighting) == 0
            assert item_weights(nothing, weighting) is None or item_weights(nothing, weighting).numel() == 0  # type: ignore[union-attr]
