"""Promise: Keye starts as exactly SigLIP and Qwen3; nothing of a source is overlooked, nothing misread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toy_sources import SIDE, pictures, recipe, write_qwen3
from transformers import (
    AutoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import keye_train.model.auto  # noqa: F401 (registers Keye)
from keye_train.cli import convert_main
from keye_train.compose import load_resolution
from keye_train.model import (
    KeyeConfig,
    VisionInputs,
    initial_dual_encoder,
    initial_model,
    keye_config,
    load_export,
    read_state,
    save_export,
)
from keye_train.model.attention import Segments
from keye_train.model.convert import Options, convert_export, convert_import, convert_start, layout
from keye_train.model.start import new_weights, siglip_target
from keye_train.model.vision import PatchLayout, VisionTransformer


@torch.no_grad()
def without_rotation(tower: VisionTransformer, vision: VisionInputs) -> tuple[Tensor, Tensor]:
    """The tower as SigLIP has it: all of its parts but the rotary positions, which SigLIP lacks.

    Returns:
        States in raster order [images, patches, C], and pooled vectors [images, C].
    """
    segments = Segments(vision.cu_seqlens, vision.max_seqlen)
    order = PatchLayout.build(vision.grid_thw, len(vision.pixel_patches), torch.device("cpu"))
    hidden = tower.encoder(tower.embeddings(vision.pixel_patches, order), segments, None)
    hidden = tower.post_layernorm(hidden)
    states = torch.empty_like(hidden)
    states[order.order] = hidden
    return states.unflatten(0, (-1, SIDE * SIDE)), tower.head(hidden, segments)


class TestStart:
    def test_the_language_model_computes_what_qwen3_does(self, start: Path, qwen3: Path) -> None:
        model, reference = load_export(start), Qwen3ForCausalLM.from_pretrained(qwen3)
        ids = torch.randint(20, 400, (2, 30))
        with torch.no_grad():
            assert (model(ids).logits - reference(ids).logits).abs().max().item() < 1e-5

    def test_the_vision_tower_computes_what_siglip_does(self, start: Path, siglip: Path) -> None:
        """At the native resolution, patch by patch and pooled."""
        images, vision = pictures(3)
        reference = SiglipModel.from_pretrained(siglip).vision_model
        with torch.no_grad():
            expected = reference(images)
        states, pooled = without_rotation(load_export(start).visual.vision_model, vision)
        assert (states - expected.last_hidden_state).abs().max().item() < 2e-5
        assert (pooled - expected.pooler_output).abs().max().item() < 2e-5

    def test_stage_0_has_both_vectors_of_siglip(self, siglip: Path) -> None:
        model, reference = initial_dual_encoder(recipe(siglip=str(siglip)), seed=0), SiglipModel.from_pretrained(siglip)
        images, vision = pictures(2)
        text_ids = torch.randint(0, 40, (4, 6))
        with torch.no_grad():
            output = reference(input_ids=text_ids, pixel_values=images)
            texts = nn.functional.normalize(model.text_model(text_ids), dim=-1)
            pooled = nn.functional.normalize(without_rotation(model.visual.vision_model, vision)[1], dim=-1)
            logits = texts @ pooled.T * model.logit_scale.exp() + model.logit_bias
        assert (texts - output.text_embeds).abs().max().item() < 1e-5
        assert (pooled - output.image_embeds).abs().max().item() < 1e-5
        assert (logits - output.logits_per_text).abs().max().item() < 1e-4

    def test_the_trainer_starts_from_the_same_weights(self, start: Path, siglip: Path, qwen3: Path) -> None:
        tied = json.loads((qwen3 / "config.json").read_text())["tie_word_embeddings"]
        settings = recipe(siglip=str(siglip), qwen3=str(qwen3), tied=tied)
        trained = initial_model(settings, seed=3).state_dict()
        converted = load_export(start).state_dict()
        assert set(converted) == set(trained)
        for name, value in converted.items():
            assert torch.equal(value, trained[name]), name
        assert load_export(start).config.to_dict() == keye_config(settings).to_dict() | {"torch_dtype": "float32"}

    def test_the_budgets_are_those_asked_for_or_the_tokenizers_or_of_the_first_report(
        self, start: Path, siglip: Path, qwen3: Path, tokenizer: Path, tmp_path: Path
    ) -> None:
        arguments = ["start", "--siglip", str(siglip), "--qwen3", str(qwen3), "--resolution", "keye_1_5"]
        with pytest.raises(SystemExit) as ended:
            convert_main([*arguments, "--tokenizer", str(tokenizer), "--out", str(tmp_path / "asked")])
        assert ended.value.code == 0
        convert_start(siglip, qwen3, tmp_path / "kept", tokenizer=tmp_path / "asked")
        asked = AutoProcessor.from_pretrained(tmp_path / "asked").resolution
        assert asked == load_resolution("keye_1_5")
        assert AutoProcessor.from_pretrained(tmp_path / "kept").resolution == asked
        assert AutoProcessor.from_pretrained(start).resolution == load_resolution("keye_v1") != asked

    def test_the_seed_draws_the_projector_only(
        self, start: Path, siglip: Path, qwen3: Path, tokenizer: Path, tmp_path: Path
    ) -> None:
        convert_start(siglip, qwen3, tmp_path / "other", tokenizer=tokenizer, seed=4)
        first, other = dict(read_state(start)), dict(read_state(tmp_path / "other"))
        changed = {name for name in first if not torch.equal(first[name], other[name])}
        assert changed == {"mlp_AR.linear_1.weight", "mlp_AR.linear_2.weight"}

    def test_untied(self, siglip: Path, tokenizer: Path, tmp_path: Path) -> None:
        tied = write_qwen3(tmp_path / "qwen3", tied=True)
        convert_start(siglip, tied, tmp_path / "out", tokenizer=tokenizer, untie=True)
        state = dict(read_state(tmp_path / "out"))
        assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
        assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]

    def test_what_is_left_out_is_listed(self, start: Path, siglip: Path) -> None:
        record = json.loads((start / "conversion.json").read_text())
        names = load_file(siglip / "model.safetensors")
        assert set(record["dropped"]) == {name for name in names if not name.startswith("vision_model.")}
        assert record["seed"] == 3

    def test_a_vision_tower_on_its_own(self, siglip: Path, qwen3: Path, tokenizer: Path, tmp_path: Path) -> None:
        """A SiglipVisionModel; newer versions of transformers save it without the prefix."""
        SiglipVisionModel.from_pretrained(siglip).save_pretrained(tmp_path / "vision")
        convert_start(tmp_path / "vision", qwen3, tmp_path / "out", tokenizer=tokenizer)
        state = dict(read_state(tmp_path / "out"))
        for name, value in load_file(siglip / "model.safetensors").items():
            if name.startswith("vision_model."):
                assert torch.equal(state[f"visual.{name}"], value), name

    def test_half_precision_and_shards(self, siglip: Path, qwen3: Path, tokenizer: Path, tmp_path: Path) -> None:
        options = Options(torch.bfloat16, max_shard_bytes=1_000_000)
        convert_start(siglip, qwen3, tmp_path / "out", tokenizer=tokenizer, options=options)
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
        exact = dict(read_state(siglip))
        for name, value in read_state(tmp_path / "out"):
            assert value.dtype == torch.bfloat16
            if name.startswith("visual.") and (source := exact.get(name.removeprefix("visual."))) is not None:
                assert torch.equal(value, source.bfloat16()), name


class TestAccounting:
    """Every tensor of a source is used, listed, or named in an error; so is every tensor of the result."""

    def altered(self, folder: Path, source: Path, change: Any) -> Path:
        folder.mkdir()
        state = load_file(source / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text((source / "config.json").read_text())
        return folder

    @pytest.mark.parametrize(
        ("part", "change", "message"),
        [
            ("siglip", lambda s: s.pop("vision_model.head.probe"), r"visual\.vision_model\.head\.probe missing"),
            ("siglip", lambda s: s.update(extra=torch.ones(1)), "extra, which is no part of SigLIP"),
            (
                "siglip",
                lambda s: s.update({"vision_model.encoder.layers.2.mlp.fc1.bias": torch.ones(48)}),
                r"layers\.2\.mlp\.fc1\.bias \[48\] has no place",
            ),
            ("qwen3", lambda s: s.pop("model.layers.1.mlp.up_proj.weight"), r"layers\.1\.mlp\.up_proj\.weight missing"),
            ("qwen3", lambda s: s.update({"model.norm.weight": torch.ones(17)}), r"\[17\], but config.json .* \[16\]"),
            ("qwen3", lambda s: s.update({"score.weight": torch.ones(1)}), "score.weight, which is no part of Qwen3"),
        ],
    )
    def test_errors(
        self, siglip: Path, qwen3: Path, tokenizer: Path, tmp_path: Path, part: str, change: Any, message: str
    ) -> None:
        sources = {"siglip": siglip, "qwen3": qwen3}
        sources[part] = self.altered(tmp_path / "altered", sources[part], change)
        with pytest.raises(ValueError, match=message):
            convert_start(sources["siglip"], sources["qwen3"], tmp_path / "out", tokenizer=tokenizer)
        assert [path.name for path in tmp_path.iterdir()] == ["altered"], "nothing half-written"

    def test_an_output_matrix_that_tying_would_lose(self, siglip: Path, tmp_path: Path, tokenizer: Path) -> None:
        tied = write_qwen3(tmp_path / "qwen3", tied=True)
        altered = self.altered(tmp_path / "altered", tied, lambda s: s.update({"lm_head.weight": torch.ones(400, 16)}))
        with pytest.raises(ValueError, match=r"output matrix of its own.*tie_word_embeddings=false"):
            convert_start(siglip, altered, tmp_path / "out", tokenizer=tokenizer)

    def test_buffers_of_older_versions_are_dropped(self, siglip: Path, qwen3: Path, tokenizer: Path, tmp_path: Path):
        name = "vision_model.embeddings.position_ids"
        older = self.altered(tmp_path / "older", siglip, lambda s: s.update({name: torch.arange(16)[None]}))
        result = convert_start(older, qwen3, tmp_path / "out", tokenizer=tokenizer)
        assert name in result.dropped

    def test_the_8b_model_is_complete(self) -> None:
        """SigLIP so400m and Qwen3-8B, as transformers builds them, fill exactly the 854 published tensors."""
        with torch.device("meta"):
            vision = SiglipVisionConfig(
                hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
                patch_size=14,
            )  # fmt: skip
            tower = SiglipVisionModel(vision)
            fields = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
            heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
            language = Qwen3ForCausalLM(Qwen3Config(vocab_size=151936, **fields, **heads))
        shapes = {siglip_target(name, ""): list(value.shape) for name, value in tower.state_dict().items()}
        shapes |= {name: list(value.shape) for name, value in language.state_dict().items()}
        shapes |= {name: list(value.shape) for name, value in new_weights(KeyeConfig(), seed=0)}
        assert shapes == golden.table("state_dict_8b_keys.json")
        assert {name: list(shape) for name, shape in layout(KeyeConfig()).items()} == shapes


class TestRefusals:
    """What Keye cannot follow is named, not converted."""

    def changed(self, folder: Path, source: Path, **fields: Any) -> Path:
        folder.mkdir()
        config = json.loads((source / "config.json").read_text())
        target = config["vision_config"] if "vision_config" in config and "model_type" not in fields else config
        target.update(fields)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    @pytest.mark.parametrize(
        ("part", "fields", "message"),
        [
            ("siglip", {"patch_size": 16}, "patch_size=16: Keye has 14"),
            ("siglip", {"model_type": "clip"}, "clip, not SigLIP"),
            ("siglip", {"vision_use_head": False}, "vision_use_head=false"),
            ("siglip", {"num_attention_heads": 16}, "multiple of 4"),
            ("qwen3", {"model_type": "qwen2"}, "qwen2, not qwen3"),
            ("qwen3", {"attention_bias": True}, "attention_bias=True: Keye has False"),
            (
                "qwen3",
                {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
                "rope_type=yarn",
            ),
        ],
    )
    def test_configurations(
        self, siglip: Path, qwen3: Path, tokenizer: Path, tmp_path: Path, part: str, fields: Any, message: str
    ) -> None:
        sources = {"siglip": siglip, "qwen3": qwen3}
        sources[part] = self.changed(tmp_path / "changed", sources[part], **fields)
        with pytest.raises(ValueError, match=message):
            convert_start(sources["siglip"], sources["qwen3"], tmp_path / "out", tokenizer=tokenizer)

    def test_a_tokenizer_without_vision_tokens(self, siglip: Path, qwen3: Path, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_text('{"added_tokens": []}')
        with pytest.raises(ValueError, match=r"no token <\|endoftext\|>.*--tokenizer"):
            convert_start(siglip, qwen3, tmp_path / "out", tokenizer=tmp_path)

    def test_what_stands_at_the_target(self, siglip: Path, qwen3: Path, tokenizer: Path, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("years of work")
        for options in (Options(), Options(overwrite=True)):
            with pytest.raises(ValueError, match="holds no model"):
                convert_start(siglip, qwen3, tmp_path, tokenizer=tokenizer, options=options)
        convert_start(siglip, qwen3, tmp_path / "out", tokenizer=tokenizer)
        with pytest.raises(ValueError, match="--overwrite"):
            convert_start(siglip, qwen3, tmp_path / "out", tokenizer=tokenizer)
        convert_start(siglip, qwen3, tmp_path / "out", tokenizer=tokenizer, options=Options(overwrite=True))

    def test_stage_0_has_no_language_model(self, tmp_path: Path) -> None:
        towers = initial_dual_encoder(recipe(random=True), seed=7)
        save_export(towers.state_dict().items(), towers.config, tmp_path / "export")
        for convert in (convert_export, convert_import):
            with pytest.raises(ValueError, match="keye-convert tower"):
                convert(tmp_path / "export", tmp_path / "out")
