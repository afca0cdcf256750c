"""Promises: what users of transformers do with a model works here, and the names mean the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from PIL import Image
from toy_inputs import synthetic_image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

import keye_train.model.auto  # noqa: F401 (registers Keye)
from keye_train.model import KeyeConfig, KeyeForConditionalGeneration, KeyeProcessor, read_state
from keye_train.model.loss import LMHead

TOLERANCE = 5e-5
BATCH = "batch_a_left"
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles flex_attention with g++")


def batch(name: str = BATCH) -> dict[str, torch.Tensor]:
    """A recorded padded batch: ids, mask, labels, media."""
    inputs = {
        field: golden.tensor("full_batched.npz", f"{name}.{field}")
        for field in ("input_ids", "attention_mask", "labels")
    }
    parts = [golden.call_arguments(str(part)) for part in golden.arrays("full_batched.npz")[f"{name}.samples"]]
    for field in sorted({field for part in parts for field in part} - {"input_ids"}):
        inputs[field] = torch.cat([part[field] for part in parts if field in part])
    return inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as ``save_pretrained`` writes it, with the ``auto_map`` of the published config.json."""
    path = tmp_path_factory.mktemp("saved")
    golden.tiny_model().save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_keye.KeyeConfig",
        "AutoModel": "modeling_keye.KeyeForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_keye.KeyeForConditionalGeneration",
    }
    (path / "config.json").write_text(json.dumps(config))
    for module in ("configuration_keye", "modeling_keye"):
        (path / f"{module}.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    return path


class TestAutoClasses:
    @pytest.mark.parametrize("trust", [None, False, True])
    def test_config(self, folder: Path, trust: bool | None) -> None:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        assert type(config) is KeyeConfig
        assert config.mrope_section == [2, 3, 3]

    @pytest.mark.parametrize(
        "auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM]
    )
    def test_models_load_by_our_code_only(self, folder: Path, auto_class: Any) -> None:
        model = auto_class.from_pretrained(folder, trust_remote_code=True)
        assert type(model) is KeyeForConditionalGeneration
        assert not model.training
        for name, value in golden.tiny_model().state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name

    def test_data_type(self, folder: Path, tmp_path: Path) -> None:
        model = KeyeForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
        again = AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert again.dtype == torch.bfloat16
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())

    def test_tied_and_untied(self, start: Path, tmp_path: Path) -> None:
        """What ``keye-convert`` writes goes through transformers' reader and writer unchanged."""
        model = AutoModelForImageTextToText.from_pretrained(start)
        model.save_pretrained(tmp_path)
        again = AutoModelForImageTextToText.from_pretrained(tmp_path)
        tied = model.config.tie_word_embeddings
        for one in (model, again):
            assert (one.lm_head.weight is one.model.embed_tokens.weight) == tied
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in read_state(start))
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in read_state(start))
        assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] == tied

    def test_shards(self, tmp_path: Path) -> None:
        model = golden.tiny_model()
        model.save_pretrained(tmp_path, max_shard_size="200KB")
        assert (tmp_path / "model.safetensors.index.json").exists()
        again = KeyeForConditionalGeneration.from_pretrained(tmp_path)
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_from_a_folder_to_an_answer(start: Path) -> None:
    """Config, processor and model by their Auto classes, a conversation with a picture in, text out."""
    processor = AutoProcessor.from_pretrained(start)
    assert type(processor) is KeyeProcessor
    model = AutoModelForImageTextToText.from_pretrained(start)
    picture = Image.fromarray(synthetic_image(56, 84))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is the colour?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    prompt = inputs["input_ids"].shape[1]
    assert tokens.shape[1] > prompt
    assert isinstance(processor.batch_decode(tokens[:, prompt:])[0], str)


class TestAttention:
    """``attn_implementation`` chooses how padded batches are computed, never what comes out."""

    @pytest.mark.parametrize("chosen", ["eager", "sdpa", pytest.param("flex_attention", marks=NEEDS_COMPILER)])
    def test_logits(self, folder: Path, chosen: str) -> None:
        model = KeyeForConditionalGeneration.from_pretrained(folder, attn_implementation=chosen)
        assert model.config._attn_implementation == chosen
        inputs = batch()
        with torch.no_grad():
            logits = model(**inputs).logits * inputs["attention_mask"][..., None]
        assert (logits - golden.tensor("full_batched.npz", f"{BATCH}.logits")).abs().max().item() <= TOLERANCE

    def test_sdpa_is_the_default(self, folder: Path) -> None:
        assert KeyeForConditionalGeneration.from_pretrained(folder).config._attn_implementation == "sdpa"

    def test_changed_later(self) -> None:
        model = golden.tiny_model().eval()
        seen = []
        for chosen in ("eager", "sdpa"):
            model.set_attn_implementation(chosen)
            output = model(**golden.call_arguments("image"), output_attentions=chosen == "eager")
            seen.append(output.logits)
        assert torch.allclose(*seen, atol=TOLERANCE)

    def test_unknown_names_are_refused(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="sdpa"):
            KeyeForConditionalGeneration.from_pretrained(folder, attn_implementation="fastest")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
    def test_flash_attention_without_its_package(self, folder: Path) -> None:
        with pytest.raises(ImportError, match=r"(?i)flash.?attention"):
            KeyeForConditionalGeneration.from_pretrained(folder, attn_implementation="flash_attention_2")


class TestForward:
    def test_attention_weights_and_hidden_states(self) -> None:
        model = golden.tiny_model().eval()
        model.set_attn_implementation("eager")
        inputs = batch()
        output = model(**inputs, output_attentions=True, output_hidden_states=True)
        layers, (rows, length) = model.config.num_hidden_layers, inputs["input_ids"].shape
        assert len(output.attentions) == layers
        assert output.attentions[0].shape == (rows, model.config.num_attention_heads, length, length)
        real = inputs["attention_mask"].bool()
        weights = output.attentions[0].transpose(1, 2)[real]
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-6)
        assert torch.equal(weights * ~real[:, None].expand(-1, length, -1)[real][:, None], torch.zeros_like(weights))
        assert len(output.hidden_states) == layers + 1
        assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)

    def test_weights_that_are_never_formed(self) -> None:
        with pytest.raises(ValueError, match="attn_implementation='eager'"):
            golden.tiny_model()(input_ids=torch.tensor([[1, 2]]), output_attentions=True)

    def test_a_tuple(self) -> None:
        model = golden.tiny_model().eval()
        arguments = golden.call_arguments("image")
        output = model(**arguments, labels=arguments["input_ids"])
        fields = model(**arguments, labels=arguments["input_ids"], return_dict=False)
        assert torch.equal(fields[0], output.loss)
        assert torch.equal(fields[1], output.logits)

    def test_cache_by_default(self) -> None:
        model = golden.tiny_model().eval()
        assert model(input_ids=torch.tensor([[1, 2]])).past_key_values.get_seq_length() == 2
        assert model.train()(input_ids=torch.tensor([[1, 2]])).past_key_values is None

    def test_accumulated_batches_share_a_divisor(self) -> None:
        """Trainer's ``num_items_in_batch``: micro-batches add up to the mean over all their labelled tokens."""
        model = golden.tiny_model()
        parts = [(golden.call_arguments(name), golden.tensor("full_single.npz", f"{name}.labels")[None])
                 for name in ("text", "image", "video")]  # fmt: skip
        count = sum(int((labels[:, 1:] != -100).sum()) for _, labels in parts)
        losses = [model(**arguments, labels=labels) for arguments, labels in parts]
        sums = [model(**arguments, labels=labels, num_items_in_batch=count).loss for arguments, labels in parts]
        counts = [int((labels[:, 1:] != -100).sum()) for _, labels in parts]
        expected = sum(output.loss * n for output, n in zip(losses, counts, strict=True)) / count
        assert torch.stack(sums).sum().item() == pytest.approx(expected.item(), rel=1e-5)

    def test_positions_of_one_axis(self) -> None:
        model = golden.tiny_model().eval()
        ids = torch.tensor([[5, 6, 7, 8]])
        given = model(input_ids=ids, position_ids=torch.arange(4)[None]).logits
        assert torch.equal(given, model(input_ids=ids).logits)

    def test_chosen_logits(self) -> None:
        model = golden.tiny_model().eval()
        arguments = golden.call_arguments("image")
        logits = model(**arguments).logits
        assert torch.allclose(model(**arguments, logits_to_keep=3).logits, logits[:, -3:], atol=1e-6)
        chosen = model(**arguments, logits_to_keep=torch.tensor([0, 4])).logits
        assert torch.allclose(chosen, logits[:, [0, 4]], atol=1e-6)
        with pytest.raises(ValueError, match="logits_to_keep"):
            model(**arguments, labels=arguments["input_ids"], logits_to_keep=3)


class TestGradientCheckpointing:
    @pytest.mark.parametrize("options", [None, {"use_reentrant": True}])
    def test_same_gradients_with_layers_run_twice(self, options: dict[str, Any] | None) -> None:
        """The switch of transformers, on a padded batch and on a pack; every tower keeps only its layers' inputs."""
        plain, saving = golden.tiny_model(), golden.tiny_model()
        saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        assert saving.is_gradient_checkpointing
        runs: list[str] = []
        for name in ("model.layers.0.mlp", "visual.vision_model.encoder.layers.0.mlp"):
            saving.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: runs.append(name))
        for backward in (
            lambda model: model(**batch()).loss.backward(),
            lambda model: model(packed=golden.pack(golden.SAMPLES, model.config)).mean().backward(),
        ):
            for model in (plain, saving):
                model.zero_grad()
                backward(model)
            for name, parameter in plain.named_parameters():
                own = saving.get_parameter(name).grad
                if parameter.grad is None:
                    assert own is None, name
                else:
                    assert own is not None, name
                    assert torch.allclose(own, parameter.grad, atol=1e-6), name
        assert runs.count("model.layers.0.mlp") == 4
        saving.gradient_checkpointing_disable()
        runs.clear()
        saving(packed=golden.pack(("text",), saving.config)).mean().backward()
        assert runs.count("model.layers.0.mlp") == 1


class TestVocabulary:
    def test_embeddings_are_where_transformers_looks(self) -> None:
        model = golden.tiny_model()
        assert model.get_input_embeddings() is model.model.embed_tokens
        assert model.get_output_embeddings() is model.lm_head

    def test_a_resized_model_still_trains(self) -> None:
        model = golden.tiny_model()
        inputs = golden.pack(("text", "image"), model.config)
        before = model(packed=inputs)
        model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
        assert isinstance(model.lm_head, LMHead)
        assert model.lm_head.weight.shape[0] == model.config.vocab_size == 520
        with torch.no_grad():
            model.lm_head.weight[512:] = 0.0
        assert (model(packed=inputs) - before).abs().max().item() < 0.1  # eight more candidates with logit 0
