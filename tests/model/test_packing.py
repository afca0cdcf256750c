"""Promises: packed equals single; samples do not see each other; every pack reaches every trainable parameter."""

from __future__ import annotations

from dataclasses import replace

import golden
import pytest
import torch
from torch import Tensor

from keye_train.model import (
    IGNORE_INDEX,
    KeyeForConditionalGeneration,
    PackedInputs,
    VisionInputs,
    enable_activation_checkpointing,
    module_parameters,
)


def gradients(model: KeyeForConditionalGeneration) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close_gradients(measured: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(measured) == set(expected)
    for name, gradient in expected.items():
        # A zero gradient in exact arithmetic (a shift of all keys, say) is pure rounding: absolute floor.
        limit = 5e-5 * gradient.norm().item() + 2e-7 * gradient.numel() ** 0.5
        assert (measured[name] - gradient).norm().item() <= limit, name


class TestPackedEqualsSingle:
    def test_losses_and_all_gradients(self) -> None:
        """Six samples with text, images and videos: one row of all of them against six rows of one."""
        model = golden.tiny_model()
        inputs = golden.pack(golden.SAMPLES, model.config)
        losses = model.forward_packed(inputs)
        losses.sum().backward()
        packed = gradients(model)
        model.zero_grad()
        for number, sample in enumerate(golden.SAMPLES):
            single = model.forward_packed(golden.pack((sample,), model.config))
            assert (losses[inputs.loss_samples == number] - single).abs().max().item() <= 1e-5
            single.sum().backward()
        assert_close_gradients(packed, gradients(model))

    def test_activation_checkpointing_changes_nothing(self) -> None:
        plain, checkpointed = golden.tiny_model(), golden.tiny_model()
        enable_activation_checkpointing(checkpointed)
        inputs = golden.pack(golden.SAMPLES, plain.config)
        results = []
        for model in (plain, checkpointed):
            losses = model.forward_packed(inputs)
            losses.sum().backward()
            results.append((losses, gradients(model)))
        assert torch.equal(results[0][0], results[1][0])
        for name, gradient in results[0][1].items():
            assert torch.equal(gradient, results[1][1][name]), name


class TestIsolation:
    @pytest.mark.parametrize("changed", ["image", "video", "image_and_video"])
    def test_a_changed_sample_leaves_the_others_bit_identical(self, changed: str) -> None:
        model = golden.tiny_model()
        inputs = golden.pack(golden.SAMPLES, model.config)
        number = golden.SAMPLES.index(changed)
        start, stop = inputs.cu_seqlens[number].item(), inputs.cu_seqlens[number + 1].item()
        inside = torch.arange(len(inputs.input_ids))
        is_text = (inputs.input_ids < 400) & (inside >= start) & (inside < stop)
        ids = torch.where(is_text, (inputs.input_ids + 7) % 400, inputs.input_ids)
        owner = torch.repeat_interleave(torch.arange(len(golden.SAMPLES)), inputs.cu_seqlens.diff().long())
        patch_owner = owner[inputs.vision_rows].repeat_interleave(4)  # patches of a grid and its tokens come in blocks
        patches = inputs.vision.pixel_patches.clone()
        patches[patch_owner == number] = 255 - patches[patch_owner == number]
        perturbed = replace(inputs, input_ids=ids, vision=replace(inputs.vision, pixel_patches=patches))
        with torch.no_grad():
            before, after = model.forward_packed(inputs), model.forward_packed(perturbed)
        own = inputs.loss_samples == number
        assert torch.equal(before[~own], after[~own])
        assert (before[own] != after[own]).all()


def empty_pack() -> PackedInputs:
    none = torch.zeros(0, dtype=torch.int64)
    vision = VisionInputs.build(torch.zeros(0, 3, 14, 14, dtype=torch.uint8), torch.zeros(0, 3, dtype=torch.int64))
    return PackedInputs.build(none, none, torch.zeros(3, 0, dtype=torch.int64), [], vision, (503, 504))


def unlabelled_pack(model: KeyeForConditionalGeneration) -> PackedInputs:
    inputs = golden.pack(("image",), model.config)
    return PackedInputs.build(
        inputs.input_ids,
        torch.full_like(inputs.labels, IGNORE_INDEX),
        inputs.position_ids,
        [len(inputs.input_ids)],
        inputs.vision,
        (503, 504),
    )


class TestEveryPackRunsEveryModule:
    @pytest.mark.parametrize("kind", ["text", "no labels", "empty"])
    def test_every_trainable_parameter_gets_a_gradient(self, kind: str) -> None:
        model = golden.tiny_model()
        packs = {
            "text": golden.pack(("text",), model.config),
            "no labels": unlabelled_pack(model),
            "empty": empty_pack(),
        }
        model.forward_packed(packs[kind]).sum().backward()
        modules = module_parameters(model)
        for name, parameter in (pair for pairs in modules.values() for pair in pairs):
            assert parameter.grad is not None, name
        unreached = ("vision", "projector") if kind == "text" else tuple(modules)
        for name, parameter in (pair for module in unreached for pair in modules[module]):
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name

    def test_a_text_pack_has_the_loss_of_its_text(self) -> None:
        model = golden.tiny_model()
        loss = model.forward_packed(golden.pack(("text",), model.config)).mean()
        assert abs(loss.item() - golden.tensor("full_single.npz", "text.loss").item()) <= 1e-5

    def test_engine_call(self) -> None:
        """Engines call the module, not a method."""
        model = golden.tiny_model()
        inputs = golden.pack(("text", "image"), model.config)
        assert torch.equal(model(packed=inputs), model.forward_packed(inputs))

    @pytest.mark.parametrize("chosen", ["eager", "sdpa", "flex_attention"])
    def test_attn_implementation_is_for_padded_batches_only(self, chosen: str) -> None:
        """No choice of the user lets samples of a pack see each other."""
        model, other = golden.tiny_model(), golden.tiny_model()
        other.set_attn_implementation(chosen)
        inputs = golden.pack(golden.SAMPLES, model.config)
        assert torch.equal(other.forward_packed(inputs), model.forward_packed(inputs))


class TestLowPrecision:
    @pytest.mark.parametrize("mode", ["bf16", "autocast"])
    def test_losses_are_near_float32(self, mode: str) -> None:
        exact, model = golden.tiny_model(), golden.tiny_model()
        inputs = golden.pack(golden.SAMPLES, model.config)
        if mode == "bf16":
            model = model.bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
            losses = model.forward_packed(inputs)
        assert losses.dtype == torch.float32
        losses.sum().backward()
        assert abs((losses.mean() - exact.forward_packed(inputs).mean()).item()) < 0.05
        assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())
