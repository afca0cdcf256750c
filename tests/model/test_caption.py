"""Promises: the caption loss reads each caption off its own image alone, and each caption counts the same."""

from __future__ import annotations

import pytest
import torch
from test_dual_encoder import TEXT, small_config

from keye_train.data.collate import collate_pairs
from keye_train.model import DualEncoder, initial_dual_encoder, load_dual_encoder, module_parameters, save_export
from keye_train.model.sample_encoder import EncodedPair
from keye_train.sample import SampleRef
from keye_train.settings import CaptionDecoderSettings, ModelSettings

DECODER = CaptionDecoderSettings(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
)
PAD = 0


def pair(number: int, grid: tuple[int, int], words: list[int]) -> EncodedPair:
    generator = torch.Generator().manual_seed(number)
    patches = torch.randint(0, 256, (grid[0] * grid[1], 3, 14, 14), dtype=torch.uint8, generator=generator)
    ids = torch.tensor(words + [PAD] * (TEXT.max_tokens - len(words)))
    return EncodedPair(
        SampleRef("pairs", "shard", str(number)),
        "pairs",
        patches,
        torch.tensor([[1, *grid]]),
        ids,
        min(len(words) + 1, TEXT.max_tokens),
    )


PAIRS = [pair(0, (2, 4), [5, 6, 7]), pair(1, (4, 4), [8]), pair(2, (2, 2), [9, 10, 11, 12, 13, 14])]


def build() -> DualEncoder:
    torch.manual_seed(0)
    return DualEncoder(small_config(), TEXT, DECODER)


def losses(model: DualEncoder, chosen: list[EncodedPair]) -> torch.Tensor:
    found = model(collate_pairs(chosen, MODEL, captions=True)).caption_losses
    assert found is not None
    return found


MODEL = ModelSettings(name="toy", tokenizer="nowhere", text_tower=TEXT)


def test_words_and_one_end_are_predicted_from_the_token_before() -> None:
    captions = collate_pairs(PAIRS, MODEL, captions=True).captions
    assert captions is not None
    assert captions.loss_targets.tolist() == [5, 6, 7, PAD, 8, PAD, 9, 10, 11, 12, 13, 14]
    assert captions.loss_samples.tolist() == [0] * 4 + [1] * 2 + [2] * 6
    # two image tokens, four of the caption; four and two; one and six
    assert captions.loss_rows.tolist() == [1, 2, 3, 4, 9, 10, 12, 13, 14, 15, 16, 17]
    assert captions.vision_rows.tolist() == [0, 1, 6, 7, 8, 9, 12]


def test_a_pack_equals_its_pairs_one_by_one() -> None:
    model = build()
    alone = torch.cat([losses(model, [one]) for one in PAIRS])
    assert torch.allclose(losses(model, PAIRS), alone, atol=1e-6)


def test_each_loss_is_the_mean_over_its_caption() -> None:
    model = build()
    inputs = collate_pairs(PAIRS, MODEL, captions=True)
    seen: list[torch.Tensor] = []
    assert model.caption_decoder is not None
    model.caption_decoder.lm_head.register_forward_hook(lambda _, __, output: seen.append(output))
    means = torch.stack([part.mean() for part in (model(inputs), seen[0])[1].split([4, 2, 6])])
    assert torch.allclose(losses(model, PAIRS), means)


def test_every_parameter_of_the_decoder_and_the_tower_learns_from_it() -> None:
    model = build()
    losses(model, PAIRS).sum().backward()
    modules = module_parameters(model)
    assert all(parameter.grad is not None for _, parameter in modules["caption_decoder"])
    tower = [name for name, parameter in modules["vision"] if parameter.grad is None]
    assert all(".head." in name for name in tower)  # pooling belongs to the contrastive loss


def test_the_towers_begin_alike_with_and_without_it() -> None:
    settings = ModelSettings(name="toy", tokenizer="nowhere", text_tower=TEXT, caption_decoder=DECODER)
    settings.start.random = True
    for name, size in vars(small_config().vision).items():
        if hasattr(settings.vision, name):
            setattr(settings.vision, name, size)
    without = initial_dual_encoder(settings, seed=3).state_dict()
    beside = initial_dual_encoder(settings, seed=3, captions=True).state_dict()
    assert all(torch.equal(value, beside[name]) for name, value in without.items())
    assert {name.split(".")[0] for name in beside.keys() - without.keys()} == {"caption_decoder"}


def test_an_export_comes_back_with_its_decoder(tmp_path: object) -> None:
    model = build()
    save_export(model.state_dict().items(), model.config, str(tmp_path))
    again = load_dual_encoder(str(tmp_path))
    assert losses(again, PAIRS).tolist() == pytest.approx(losses(model.eval(), PAIRS).tolist())
