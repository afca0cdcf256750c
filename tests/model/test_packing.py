"""Promises: packed equals single; samples do not see each other; every pack reaches every trainable parameter; the
forward and the backward never wait for the device."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from typing import Any

import golden
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from keye_train.model import (
    IGNORE_INDEX,
    KeyeConfig,
    KeyeForConditionalGeneration,
    PackedInputs,
    VisionInputs,
    attention,
    enable_activation_checkpointing,
    module_parameters,
)
from keye_train.model.packed import upload

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def gradients(model: KeyeForConditionalGeneration) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close_gradients(measured: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(measured) == set(expected)
    for name, gradient in expected.items():
        # A zero gradient in exact arithmetic (a shift of all keys, say) is pure rounding: absolute floor.
        limit = 5e-5 * gradient.norm().item() + 2e-7 * gradient.numel() ** 0.5
        assert (measured[name] - gradient).norm().item() <= limit, name


def packed_logits(model: KeyeForConditionalGeneration, inputs: PackedInputs) -> Tensor:
    """Logits [T, V] of all rows of a pack; the training forward itself forms those of labelled rows only."""
    hidden: list[Tensor] = []
    hook = model.model.register_forward_hook(lambda _, __, output: hidden.append(output[0]))
    model.forward_packed(inputs)
    hook.remove()
    return model.lm_head(hidden[0])


class TestPackedEqualsSingle:
    def test_logits(self) -> None:
        """Of every token of a pack, against each sample alone and against the published code."""
        model = golden.tiny_model()
        inputs = golden.pack(golden.SAMPLES, model.config)
        with torch.no_grad():
            parts = packed_logits(model, inputs).split(inputs.cu_seqlens.diff().tolist())
            for sample, logits in zip(golden.SAMPLES, parts, strict=True):
                single = packed_logits(model, golden.pack((sample,), model.config))
                assert (logits - single).abs().max().item() <= 2e-5
                published = golden.tensor("full_single.npz", f"{sample}.logits")
                assert (logits - published).abs().max().item() <= 5e-5

    @pytest.mark.gpu
    @CUDA
    def test_on_the_fused_kernel(self) -> None:
        """bf16 on a GPU: losses and gradients of a pack against its samples alone, and against float32."""
        exact, model = golden.tiny_model(), golden.tiny_model().bfloat16().cuda()
        inputs = golden.pack(golden.SAMPLES, model.config)
        losses = model.forward_packed(inputs.to("cuda"))
        losses.sum().backward()
        packed = gradients(model)
        model.zero_grad()
        for number, sample in enumerate(golden.SAMPLES):
            single = model.forward_packed(golden.pack((sample,), model.config).to("cuda"))
            assert (losses[inputs.loss_samples == number] - single).abs().max().item() <= 0.05
            single.sum().backward()
        exact_losses = exact.forward_packed(inputs)
        assert (losses.cpu() - exact_losses).abs().mean().item() <= 0.05
        exact_losses.sum().backward()
        largest = max(gradient.norm() for gradient in gradients(exact).values())
        for name, gradient in gradients(model).items():
            floor = 0.02 * largest.item()
            assert (packed[name] - gradient).norm().item() <= 0.05 * gradient.norm().item() + floor, name
            expected = gradients(exact)[name]
            assert (gradient.float().cpu() - expected).norm().item() <= 0.05 * expected.norm().item() + floor, name

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

    @pytest.mark.parametrize("selective", [False, True])
    def test_activation_checkpointing_changes_nothing_but_what_is_computed_again(self, selective: bool) -> None:
        plain, checkpointed = golden.tiny_model(), golden.tiny_model()
        enable_activation_checkpointing(checkpointed, selective)
        inputs = golden.pack(golden.SAMPLES, plain.config)
        results, attended = [], []
        for model in (plain, checkpointed):
            with Operations() as operations:
                losses = model.forward_packed(inputs)
                losses.sum().backward()
            results.append((losses, gradients(model)))
            attended.append(sum("attention" in name and "backward" not in name for name in operations.names))
        assert attended[0] > 0
        assert attended[1] == attended[0] * (1 if selective else 2)
        assert torch.equal(results[0][0], results[1][0])
        for name, gradient in results[0][1].items():
            assert torch.equal(gradient, results[1][1][name]), name


def flipped_sample(inputs: PackedInputs, number: int, what: str) -> PackedInputs:
    """The pack with other words, or other pixels, in one sample."""
    owner = torch.repeat_interleave(torch.arange(len(inputs.cu_seqlens) - 1), inputs.cu_seqlens.diff().long())
    if what == "text":
        changed = (inputs.input_ids < 400) & (owner == number)
        return replace(inputs, input_ids=torch.where(changed, (inputs.input_ids + 7) % 400, inputs.input_ids))
    patches = inputs.vision.pixel_patches.clone()
    changed = owner[inputs.vision_rows].repeat_interleave(4) == number  # patches and tokens of a grid come in blocks
    patches[changed] = 255 - patches[changed]
    return replace(inputs, vision=replace(inputs.vision, pixel_patches=patches))


class TestIsolation:
    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, CUDA])])
    @pytest.mark.parametrize(
        ("sample", "what"),
        [(name, what) for name in golden.SAMPLES for what in ("text", "pixels") if (name, what) != ("text", "pixels")],
    )
    def test_a_changed_sample_leaves_the_others_bit_identical(self, sample: str, what: str, device: str) -> None:
        model = golden.tiny_model().to(device, torch.bfloat16 if device == "cuda" else torch.float32)
        inputs = golden.pack(golden.SAMPLES, model.config)
        number = golden.SAMPLES.index(sample)
        with torch.no_grad():
            before, after = (
                model.forward_packed(pack.to(device)) for pack in (inputs, flipped_sample(inputs, number, what))
            )
        own = inputs.loss_samples.to(device) == number
        assert torch.equal(before[~own], after[~own])
        assert (before[own] != after[own]).any()

    def test_a_changed_image_leaves_the_others_bit_identical(self) -> None:
        """Also within one sample: nothing of an image enters the features of another."""
        model = golden.tiny_model()
        vision = golden.pack(golden.SAMPLES, model.config).vision
        borders = vision.cu_seqlens.tolist()
        with torch.no_grad():
            before = model.vision_features(vision)
            for start, stop in pairwise(borders):
                patches = vision.pixel_patches.clone()
                patches[start] = 255 - patches[start]  # one patch
                after = model.vision_features(replace(vision, pixel_patches=patches))
                rows = torch.arange(len(before))
                own = (rows >= start // 4) & (rows < stop // 4)
                assert torch.equal(before[~own], after[~own])
                assert (before[own] != after[own]).any(dim=1).all()

    def test_no_gradient_crosses_a_border(self) -> None:
        """Another loss in one sample leaves what the others ask of their own pixels and words as it was."""
        model = golden.tiny_model()
        inputs = golden.pack(golden.SAMPLES, model.config)
        pixels = golden.floats(inputs.vision.pixel_patches).requires_grad_()
        losses = model.forward_packed(replace(inputs, vision=replace(inputs.vision, pixel_patches=pixels)))
        owner = torch.repeat_interleave(torch.arange(len(golden.SAMPLES)), inputs.cu_seqlens.diff().long())
        patch_owner = owner[inputs.vision_rows].repeat_interleave(4)
        for number in range(len(golden.SAMPLES)):
            own = inputs.loss_samples == number
            (gradient,) = torch.autograd.grad(losses[own].sum(), pixels, retain_graph=True)
            reached = gradient.flatten(1).any(dim=1)
            assert torch.equal(reached, patch_owner == number)


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


class Operations(TorchDispatchMode):
    """Names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def map_tensors(inputs: Any, function: Any) -> Any:
    """A dataclass of tensors and of such dataclasses, with ``function`` applied to each tensor."""
    values = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    mapped = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
    deeper = {name: map_tensors(value, function) for name, value in values.items() if is_dataclass(value)}
    return replace(inputs, **mapped, **deeper)


def fake_forward(
    samples: tuple[str, ...], checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[KeyeForConditionalGeneration, Tensor, list[str]]:
    """The training forward as a GPU runs it, on tensors that have shapes and no values: reading one raises.

    The segment-wise attention of the CPU is the one place that may read values (lengths of segments), so what a GPU
    runs, the fused kernel (its shape function), stands in for it.

    Returns:
        Model, losses, names of all operations.
    """
    monkeypatch.setattr(attention, "_attention_by_segment", attention._flash_attention())
    mode = FakeTensorMode()
    config = KeyeConfig(**golden.table("tiny_config.json"))
    inputs = map_tensors(golden.pack(samples, config), mode.from_tensor)
    with mode:
        model = KeyeForConditionalGeneration(config)
        if checkpointing != "none":
            enable_activation_checkpointing(model, checkpointing == "selective")
        with Operations() as operations, torch.autocast("cpu", dtype=torch.bfloat16):
            losses = model.forward_packed(inputs)
    assert losses.shape == inputs.loss_rows.shape
    return model, losses, operations.names


class TestNothingWaitsForTheDevice:
    @pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
    @pytest.mark.parametrize("samples", [golden.SAMPLES, ("text",)])
    def test_forward_and_backward_read_no_value(
        self, samples: tuple[str, ...], checkpointing: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, losses, _ = fake_forward(samples, checkpointing, monkeypatch)
        losses.sum().backward()
        for name, parameter in (pair for pairs in module_parameters(model).values() for pair in pairs):
            assert parameter.grad is not None, name

    def test_nothing_loops_over_images_or_samples(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The very same operations for one image as for many images and videos: one call of each tower."""
        one, many = (fake_forward(samples, "none", monkeypatch)[2] for samples in (("image",), golden.SAMPLES))
        assert one == many
        # Once per pack, not once per layer: the gather from the position table, and each tower's angles.
        assert [many.count(name) for name in ("_embedding_bag", "cos", "sin")] == [1, 2, 2]

    def test_on_the_cpu_an_upload_copies_nothing(self) -> None:
        inputs = golden.pack(golden.SAMPLES, golden.tiny_model().config)
        moved = inputs.to("cpu")
        assert moved.input_ids is inputs.input_ids
        assert moved.vision.pixel_patches is inputs.vision.pixel_patches

    @pytest.mark.gpu
    @CUDA
    def test_an_upload_does_not_wait_for_the_gpu(self) -> None:
        levels = torch.randint(256, (1 << 24,), dtype=torch.uint8)
        upload(levels, "cuda")  # from now on the allocator has the page-locked memory
        torch.cuda.synchronize()
        torch.cuda._sleep(1 << 31)  # cycles: most of a second
        busy = torch.cuda.Event()
        busy.record()
        moved = upload(levels, "cuda")
        assert not busy.query()
        assert torch.equal(moved.cpu(), levels)

    @pytest.mark.gpu
    @CUDA
    def test_no_synchronisation_on_a_gpu(self) -> None:
        model = golden.tiny_model().bfloat16().cuda()
        inputs = golden.pack(golden.SAMPLES, model.config).to("cuda")
        model.forward_packed(inputs).sum().backward()  # libraries start up
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.forward_packed(inputs).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
