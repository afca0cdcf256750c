"""Promise: the numbers are those of the published Keye-VL code (tests/golden/README.md states the tolerances)."""

from __future__ import annotations

import golden
import pytest
import torch

from keye_train.model import KeyeConfig, KeyeForConditionalGeneration, VisionInputs
from keye_train.model.language import mrope_tables
from keye_train.model.vision import PatchLayout, normalize_levels, rotary_tables, rotate

TOLERANCE = 5e-5


def close(measured: torch.Tensor, expected: torch.Tensor) -> None:
    assert (measured - expected).abs().max().item() <= TOLERANCE


class TestVision:
    @pytest.mark.parametrize("case", ["images_abc", "image_wide", "video_one", "video_two"])
    def test_every_layer_and_the_projector(self, case: str) -> None:
        model = golden.tiny_model()
        expected = {name: golden.tensor("vision.npz", f"{case}.{name}") for name in ("emb", "hidden", "last", "proj")}
        vision = VisionInputs.build(
            golden.tensor("vision.npz", f"{case}.pixels_u8"), golden.tensor("vision.npz", f"{case}.grid_thw")
        )
        seen: list[torch.Tensor] = []
        transformer = model.visual.vision_model
        for layer in transformer.encoder.layers:
            layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        last = model.visual(vision)
        order = PatchLayout.build(vision.grid_thw, len(last), last.device).order  # raster place of each row
        close(seen[0], expected["emb"][order])
        for states, layer_input in zip(seen, expected["hidden"], strict=False):
            close(states, layer_input[order])
        close(last, expected["last"][order])
        close(model.mlp_AR(last), expected["proj"])

    def test_pixel_levels_are_bit_identical(self) -> None:
        levels = torch.arange(256, dtype=torch.uint8)
        assert torch.equal(normalize_levels(levels), golden.floats(levels))


class TestRotaryTables:
    """In the geometry of the 8B model."""

    def test_vision(self) -> None:
        stored = golden.arrays("rope_tables_8b.npz")
        row, column = torch.from_numpy(stored["vision_hw"]).unbind(1)
        cosine, sine = rotary_tables(row, column, 72)
        close(cosine.repeat(1, 2), torch.from_numpy(stored["vision_cos"]))
        close(sine.repeat(1, 2), torch.from_numpy(stored["vision_sin"]))
        close(
            rotate(torch.from_numpy(stored["vision_x"]), (cosine, sine)), torch.from_numpy(stored["vision_x_rotated"])
        )

    def test_text(self) -> None:
        stored = golden.arrays("rope_tables_8b.npz")
        positions = torch.from_numpy(stored["text_position_ids"])
        cosine, sine = mrope_tables(positions[:, None], KeyeConfig(head_dim=128), torch.float32)
        close(cosine[0], torch.from_numpy(stored["text_cos"]))
        close(sine[0], torch.from_numpy(stored["text_sin"]))


class TestWholeModel:
    @pytest.mark.parametrize("sample", golden.SAMPLES)
    def test_single_sample(self, sample: str) -> None:
        model = golden.tiny_model()
        labels = golden.tensor("full_single.npz", f"{sample}.labels")[None]
        output = model(**golden.call_arguments(sample), labels=labels)
        close(output.logits[0], golden.tensor("full_single.npz", f"{sample}.logits"))
        assert output.rope_deltas.item() == golden.tensor("full_single.npz", f"{sample}.rope_delta").item()
        assert abs(output.loss.item() - golden.tensor("full_single.npz", f"{sample}.loss").item()) <= 1e-5
        output.loss.backward()
        expected = golden.table("full_single_grads.json")[sample]
        golden.assert_gradient_norms(model, {name: row and row["norm"] for name, row in expected.items()})
        for name, row in expected.items():
            if row is not None:
                gradient = model.get_parameter(name).grad
                assert gradient is not None
                scale = max(row["norm"], 1e-3)
                first = torch.tensor(row["first"])
                assert abs(gradient.double().sum().item() - row["sum"]) <= 5e-5 * scale * gradient.numel() ** 0.5, name
                assert abs(gradient.abs().max().item() - row["absmax"]) <= 5e-5 * scale, name
                assert (gradient.flatten()[: len(first)] - first).abs().max().item() <= 5e-5 * scale, name

    @pytest.mark.parametrize("side", ["right", "left"])
    @pytest.mark.parametrize("batch", ["batch_a", "batch_b"])
    def test_padded_batch(self, batch: str, side: str) -> None:
        model = golden.tiny_model()
        case = f"{batch}_{side}"
        fields = {
            name: golden.tensor("full_batched.npz", f"{case}.{name}")
            for name in ("input_ids", "attention_mask", "labels", "rope_deltas")
        }
        parts = [golden.call_arguments(str(name)) for name in golden.arrays("full_batched.npz")[f"{case}.samples"]]
        media = {
            name: torch.cat([part[name] for part in parts if name in part])
            for name in sorted({name for part in parts for name in part} - {"input_ids"})
        }
        output = model(
            input_ids=fields["input_ids"], attention_mask=fields["attention_mask"], labels=fields["labels"], **media
        )
        assert torch.equal(output.rope_deltas, fields["rope_deltas"])
        assert abs(output.loss.item() - golden.tensor("full_batched.npz", f"{case}.loss").item()) <= 1e-5
        if batch == "batch_a":
            close(
                output.logits * fields["attention_mask"][..., None],
                golden.tensor("full_batched.npz", f"{case}.logits"),
            )
        output.loss.backward()
        golden.assert_gradient_norms(model, golden.table(f"{batch}_gradnorms.json"))

    def test_packed(self) -> None:
        model = golden.tiny_model()
        expected = golden.table("full_packed.json")
        inputs = golden.pack(tuple(expected["samples"]), model.config)
        assert inputs.cu_seqlens.tolist() == expected["cu_seqlens"]
        loss = model.forward_packed(inputs).mean()
        assert abs(loss.item() - expected["loss"]) <= 1e-5
        loss.backward()
        golden.assert_gradient_norms(model, expected["grad_norms"])

    @pytest.mark.parametrize("sample", golden.SAMPLES)
    @torch.no_grad()
    def test_greedy_steps_with_cache(self, sample: str) -> None:
        model = golden.tiny_model().eval()
        expected = golden.table("greedy_with_cache.json")[sample]
        output = model(**golden.call_arguments(sample), use_cache=True, logits_to_keep=1)
        assert output.rope_deltas.item() == expected["rope_delta"]
        for step, (token, logit) in enumerate(zip(expected["greedy"], expected["top1_logit"], strict=True)):
            best = output.logits[0, -1].max(dim=0)
            assert best.indices.item() == token
            assert abs(best.values.item() - logit) <= TOLERANCE
            if step + 1 < len(expected["greedy"]):
                output = model(
                    input_ids=best.indices.view(1, 1),
                    past_key_values=output.past_key_values,
                    rope_deltas=output.rope_deltas,
                )


class TestNames:
    def test_tiny_state_dict(self) -> None:
        shapes = {name: list(value.shape) for name, value in golden.tiny_model().state_dict().items()}
        assert shapes == golden.table("state_dict_keys.json")

    def test_8b_state_dict(self) -> None:
        with torch.device("meta"):
            model = KeyeForConditionalGeneration(KeyeConfig())
        shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
        assert len(shapes) == 854
        assert shapes == golden.table("state_dict_8b_keys.json")
