"""Promises: an export comes back bit for bit; SigLIP and Qwen3 weights land in their places; nothing is ignored."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipConfig, SiglipModel

from keye_train.model import (
    KeyeConfig,
    KeyeForConditionalGeneration,
    KeyeVisionConfig,
    initial_dual_encoder,
    initial_model,
    keye_config,
    load_dual_encoder,
    load_export,
    load_state,
    read_state,
    save_export,
)
from keye_train.settings import (
    LanguageModelSettings,
    ModelSettings,
    SpecialTokenSettings,
    StartWeightsSettings,
    TextTowerSettings,
    VisionTowerSettings,
)

logging.getLogger("transformers").setLevel(logging.ERROR)


def settings(**start: Any) -> ModelSettings:
    return ModelSettings(
        name="small",
        tokenizer="",
        vision=VisionTowerSettings(32, 48, 2, 4, 56),
        language=LanguageModelSettings(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            mrope_section=[2, 1, 1],
        ),
        special_tokens=SpecialTokenSettings(1, 2, 0, 3, 4, 5, 6, 7),
        text_tower=TextTowerSettings(40, 32, 48, 2, 4, 6),
        start=StartWeightsSettings(**start),
    )


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as transformers' own SigLIP writes it."""
    folder = tmp_path_factory.mktemp("siglip")
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = tower | {"vocab_size": 40, "max_position_embeddings": 6, "projection_size": 32}
    torch.manual_seed(1)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=tower | {"image_size": 56, "patch_size": 14}))
    model.save_pretrained(folder)
    return folder


def write_qwen3(folder: Path, tied: bool) -> Path:
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(2)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3(tmp_path_factory.mktemp("qwen3"), tied=False)


class TestExport:
    @pytest.mark.parametrize("max_shard_bytes", [10**9, 200_000])
    def test_round_trip(self, tmp_path: Path, max_shard_bytes: int) -> None:
        model = golden.tiny_model()
        extra = tmp_path / "notes.txt"
        extra.write_text("kept")
        folder = tmp_path / "export"
        save_export(model.state_dict().items(), model.config, folder, max_shard_bytes, {"notes.txt": extra})
        assert len(list(folder.glob("*.safetensors"))) == 1 or max_shard_bytes < 10**9
        assert (folder / "notes.txt").read_text() == "kept"
        again = load_export(folder)
        assert {name: tuple(value.shape) for name, value in again.state_dict().items()} == {
            name: tuple(shape) for name, shape in golden.table("state_dict_keys.json").items()
        }
        for name, value in again.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name
        assert list(tmp_path.glob(".*")) == []

    def test_config_has_the_published_fields(self, tmp_path: Path) -> None:
        published = golden.table("tiny_config.json")
        model = golden.tiny_model()
        save_export(model.state_dict().items(), model.config, tmp_path / "export")
        written = json.loads((tmp_path / "export" / "config.json").read_text())
        absent = {name for name in published if name not in written} - {"use_cache"}
        assert absent == set()
        assert {name: written[name] for name in published if name in written} == published | {
            "vision_config": written["vision_config"]
        }
        vision = written["vision_config"]
        assert {name: vision[name] for name in published["vision_config"]} == published["vision_config"]

    def test_transformers_reads_it_too(self, tmp_path: Path) -> None:
        model = golden.tiny_model()
        save_export(model.state_dict().items(), model.config, tmp_path / "export")
        again = KeyeForConditionalGeneration.from_pretrained(tmp_path / "export")
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())

    def test_data_type(self, tmp_path: Path) -> None:
        model = golden.tiny_model().bfloat16()
        save_export(model.state_dict().items(), model.config, tmp_path / "export")
        assert json.loads((tmp_path / "export" / "config.json").read_text())["torch_dtype"] == "bfloat16"
        assert load_export(tmp_path / "export").lm_head.weight.dtype == torch.bfloat16
        assert load_export(tmp_path / "export", torch.float32).lm_head.weight.dtype == torch.float32

    def test_a_failed_export_leaves_the_old_one(self, tmp_path: Path) -> None:
        model = golden.tiny_model()
        folder = tmp_path / "export"
        save_export([("a", torch.ones(1))], model.config, folder)

        def breaks() -> Iterator[tuple[str, torch.Tensor]]:
            yield "b", torch.ones(1)
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            save_export(breaks(), model.config, folder)
        assert [name for name, _ in read_state(folder)] == ["a"]
        assert [path.name for path in tmp_path.iterdir()] == ["export"]

    def test_a_failed_move_puts_the_old_one_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = golden.tiny_model().config
        folder = tmp_path / "export"
        save_export([("a", torch.ones(1))], config, folder)
        move = Path.replace

        def breaks(self: Path, target: Path) -> Path:
            if self.suffix == ".tmp" and self.is_dir():
                raise OSError("stale file handle")
            return move(self, target)

        monkeypatch.setattr(Path, "replace", breaks)
        with pytest.raises(OSError, match="stale file handle"):
            save_export([("b", torch.ones(1))], config, folder)
        assert [name for name, _ in read_state(folder)] == ["a"]
        assert [path.name for path in tmp_path.iterdir()] == ["export"]

    def test_behind_a_link(self, tmp_path: Path) -> None:
        config = golden.tiny_model().config
        disk, link = tmp_path / "disk", tmp_path / "runs" / "export"
        link.parent.mkdir()
        link.symlink_to(disk / "model")
        for name in ("a", "b"):
            save_export([(name, torch.ones(1))], config, link)
            assert [name for name, _ in read_state(disk / "model")] == [name]
        assert link.is_symlink()
        assert [path.name for path in link.parent.iterdir()] == ["export"]
        assert [path.name for path in disk.iterdir()] == ["model"]

    def test_tied_weights(self, tmp_path: Path) -> None:
        wanted = settings(random=True)
        wanted.language.tie_word_embeddings = True
        model = initial_model(wanted, seed=0)
        save_export(model.named_parameters(), model.config, tmp_path / "export")
        again = load_export(tmp_path / "export")
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)

    def test_missing_and_foreign_tensors_are_named(self, tmp_path: Path) -> None:
        model = golden.tiny_model()
        state = dict(model.state_dict())
        del state["model.norm.weight"]
        save_export(state.items(), model.config, tmp_path / "short")
        with pytest.raises(ValueError, match=r"model\.norm\.weight"):
            load_export(tmp_path / "short")
        with pytest.raises(ValueError, match=r"model\.layers\.9\.self_attn.*num_hidden_layers"):
            load_state(model, [("model.layers.9.self_attn.q_proj.weight", torch.ones(1))])
        with pytest.raises(ValueError, match=r"\[3, 64\].*\[512, 64\].*model\.language\.vocab_size"):
            load_state(model, [("model.embed_tokens.weight", torch.ones(3, 64))])

    def test_only_safetensors_are_read(self, tmp_path: Path) -> None:
        torch.save({}, tmp_path / "pytorch_model.bin")
        with pytest.raises(FileNotFoundError, match="safetensors"):
            list(read_state(tmp_path))


class TestStart:
    def test_from_siglip_and_qwen3(self, siglip: Path, qwen3: Path) -> None:
        model = initial_model(settings(siglip=str(siglip), qwen3=str(qwen3)), seed=0)
        own = model.state_dict()
        for name, value in load_file(siglip / "model.safetensors").items():
            if name.startswith("vision_model."):
                assert torch.equal(own[f"visual.{name}"], value), name
        for name, value in load_file(qwen3 / "model.safetensors").items():
            assert torch.equal(own[name], value), name
        assert own["mlp_AR.linear_1.weight"].std().item() == pytest.approx(0.02, rel=0.1)

    def test_text_logits_are_those_of_qwen3(self, siglip: Path, qwen3: Path) -> None:
        model = initial_model(settings(siglip=str(siglip), qwen3=str(qwen3)), seed=0)
        reference: Any = Qwen3ForCausalLM.from_pretrained(qwen3, attn_implementation="eager")
        model.config.rope_theta = reference.config.rope_parameters["rope_theta"]
        ids = torch.arange(8, 20)[None]
        with torch.no_grad():
            expected = reference(ids).logits
            assert torch.allclose(model(ids).logits, expected, atol=1e-5)

    def test_stage_0_vectors_are_those_of_siglip(self, siglip: Path) -> None:
        """On text; the vision tower differs by its rotary positions."""
        model = initial_dual_encoder(settings(siglip=str(siglip)), seed=0)
        reference = SiglipModel.from_pretrained(siglip)
        text_ids = torch.randint(0, 40, (3, 6))
        with torch.no_grad():
            expected = reference.text_model(text_ids).pooler_output
            assert torch.allclose(model.text_model(text_ids), expected, atol=1e-5)
        assert torch.equal(model.logit_bias, reference.logit_bias)

    def test_a_tied_source_is_copied_into_an_untied_model(self, siglip: Path, tmp_path: Path) -> None:
        tied = write_qwen3(tmp_path, tied=True)
        model = initial_model(settings(siglip=str(siglip), qwen3=str(tied)), seed=0)
        assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
        assert model.lm_head.weight is not model.model.embed_tokens.weight

    def test_the_seed_decides(self) -> None:
        first, same, other = (initial_model(settings(random=True), seed=seed) for seed in (3, 3, 4))
        for name, value in first.named_parameters():
            assert torch.equal(value, same.get_parameter(name)), name
        assert not torch.equal(first.lm_head.weight, other.lm_head.weight)

    def test_no_source_is_an_error(self, siglip: Path, qwen3: Path) -> None:
        with pytest.raises(ValueError, match=r"model\.start\.random=true"):
            initial_model(settings(), seed=0)
        with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight|lm_head"):
            initial_model(settings(siglip=str(siglip)), seed=0)

    def test_another_shape_names_the_setting(self, siglip: Path, qwen3: Path) -> None:
        wanted = settings(siglip=str(siglip), qwen3=str(qwen3))
        wanted.language.intermediate_size = 40
        with pytest.raises(ValueError, match=r"mlp.*\[16, 24\].*\[16, 40\].*model\.language\.intermediate_size"):
            initial_model(wanted, seed=0)

    def test_a_foreign_checkpoint_is_refused(self, tmp_path: Path, qwen3: Path) -> None:
        save_file({"transformer.wte.weight": torch.ones(2)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"transformer\.wte\.weight.*model\.start\.qwen3"):
            initial_model(settings(qwen3=str(tmp_path), random=True), seed=0)


class TestParent:
    def test_stage_1_takes_the_tower_of_stage_0(self, tmp_path: Path) -> None:
        towers = initial_dual_encoder(settings(random=True), seed=7)
        save_export(towers.state_dict().items(), towers.config, tmp_path / "export")
        again = load_dual_encoder(tmp_path / "export")
        assert all(torch.equal(value, towers.state_dict()[name]) for name, value in again.state_dict().items())
        model = initial_model(settings(random=True), seed=1, parent=tmp_path / "export")
        for name, value in towers.visual.state_dict().items():
            assert torch.equal(model.visual.state_dict()[name], value), name
        with pytest.raises(ValueError, match="no language model"):
            load_export(tmp_path / "export")

    def test_a_later_stage_takes_everything(self, tmp_path: Path) -> None:
        parent = initial_model(settings(random=True), seed=7)
        save_export(parent.state_dict().items(), parent.config, tmp_path / "export")
        child = initial_model(settings(), seed=1, parent=tmp_path / "export")
        assert all(torch.equal(value, parent.state_dict()[name]) for name, value in child.state_dict().items())


def test_initial_losses_are_those_of_guessing() -> None:
    """Random weights of the recipe's scheme know nothing, and say so."""
    model = initial_model(settings(random=True), seed=0)
    ids = torch.randint(8, 64, (1, 32))
    assert model(ids, labels=ids).loss.item() == pytest.approx(torch.log(torch.tensor(64.0)).item(), abs=0.05)


def test_the_published_8b_config_is_the_default() -> None:
    published = Path(__file__).parents[3] / "shared" / "keye-vl-8b-preview" / "config.json"
    if not published.exists():
        pytest.skip(f"{published} is not there")
    stored = KeyeConfig(**json.loads(published.read_text()))
    own = keye_config(ModelSettings(name="8b", tokenizer=""))
    for name in KeyeConfig.__annotations__:
        if name != "vision_config":
            assert getattr(stored, name) == getattr(own, name), name
    for name in KeyeVisionConfig.__annotations__:
        assert getattr(stored.vision, name) == getattr(own.vision, name), name
