"""Promises: weights go in and out without loss, and no second copy is held."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import golden
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from toy_sources import pictures, recipe, write_qwen3
from transformers import (
    AutoModelForImageTextToText,
    SiglipModel,
    SiglipVisionModel,
)

import keye_train.model.auto  # noqa: F401 (registers Keye)
from keye_train.cli import convert_main
from keye_train.model import (
    KeyeConfig,
    initial_dual_encoder,
    initial_model,
    load_export,
    read_state,
    save_export,
)
from keye_train.model.convert import Options, convert_export, convert_import, convert_tower
from keye_train.model.convert_inspect import describe

PUBLISHED = Path(__file__).parents[3] / "shared" / "keye-vl-8b-preview"


@pytest.fixture(scope="module")
def published(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in the published layout: shards, index, processor files, and code that must not run."""
    folder = tmp_path_factory.mktemp("published") / "model"
    model = golden.tiny_model()
    save_export(model.state_dict().items(), model.config, folder, max_shard_bytes=300_000)
    config = golden.table("tiny_config.json") | {"auto_map": {"AutoConfig": "configuration_keye.KeyeConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    processor = {
        "min_pixels": 3136,
        "max_pixels": 200704,
        "auto_map": {"AutoProcessor": "processing_keye.KeyeProcessor"},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "configuration_keye.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    return folder


class TestRoundTrip:
    def test_out_and_in_again(self, published: Path, tmp_path: Path) -> None:
        convert_import(published, tmp_path / "in")
        convert_export(tmp_path / "in", tmp_path / "out", options=Options(max_shard_bytes=200_000))
        convert_import(tmp_path / "out", tmp_path / "again")
        expected = dict(read_state(published))
        assert set(expected) == set(golden.table("state_dict_keys.json"))
        for folder in ("in", "out", "again"):
            state = dict(read_state(tmp_path / folder))
            assert set(state) == set(expected)
            for name, value in state.items():
                assert value.dtype == expected[name].dtype
                assert torch.equal(value, expected[name]), (folder, name)
        for file in ("config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"):
            assert (tmp_path / "in" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file

    def test_what_comes_in(self, published: Path, tmp_path: Path) -> None:
        result = convert_import(published, tmp_path / "in")
        assert result.tensors == len(golden.table("state_dict_keys.json"))
        assert result.dropped == ["configuration_keye.py"]
        assert list((tmp_path / "in").glob("*.py")) == []
        for file in ("config.json", "preprocessor_config.json"):
            assert "auto_map" not in json.loads((tmp_path / "in" / file).read_text())
        assert json.loads((tmp_path / "in" / "preprocessor_config.json").read_text())["max_pixels"] == 200704
        arguments = golden.call_arguments("image")
        with torch.no_grad():
            logits = load_export(tmp_path / "in")(**arguments).logits[0]
        assert (logits - golden.tensor("full_single.npz", "image.logits")).abs().max().item() <= 5e-5

    def test_what_goes_out(self, published: Path, tmp_path: Path) -> None:
        convert_export(published, tmp_path / "out", options=Options(max_shard_bytes=200_000))
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(golden.table("state_dict_keys.json"))
        assert index["metadata"]["total_size"] == sum(value.nbytes for _, value in read_state(published))
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        for name, value in golden.table("tiny_config.json").items():
            if name == "vision_config":
                assert {field: written[name][field] for field in value} == value
            else:
                assert written[name] == value, name
        code = written["auto_map"]["AutoModel"]
        assert code == "Kwai-Keye/Keye-VL-8B-Preview--modeling_keye.KeyeForConditionalGeneration"
        sampling = json.loads((tmp_path / "out" / "generation_config.json").read_text())
        assert sampling["eos_token_id"] == [499, 498]
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
        assert model.generation_config.pad_token_id == 498
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in read_state(published))

    def test_without_code(self, published: Path, tmp_path: Path) -> None:
        convert_export(published, tmp_path / "out", repository=None)
        assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())

    def test_a_tied_model_with_both_matrices(self, siglip: Path, tokenizer: Path, tmp_path: Path) -> None:
        """As ``state_dict()`` lists them; one goes out."""
        qwen3 = write_qwen3(tmp_path / "qwen3", tied=True)
        model = initial_model(recipe(siglip=str(siglip), qwen3=str(qwen3), tied=True), seed=0)
        save_export(model.state_dict().items(), model.config, tmp_path / "export")
        result = convert_export(tmp_path / "export", tmp_path / "out", tokenizer=tokenizer)
        assert result.dropped == ["lm_head.weight"]
        again = load_export(tmp_path / "out")
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)

    def test_the_published_config_and_files(self, tokenizer: Path, tmp_path: Path) -> None:
        """Every field that config.json of Keye-VL-8B-Preview has comes out as it went in."""
        if not PUBLISHED.exists():
            pytest.skip(f"{PUBLISHED} is not there")
        stored = json.loads((PUBLISHED / "config.json").read_text())
        save_export([("a", torch.ones(1, dtype=torch.bfloat16))], KeyeConfig(**stored), tmp_path / "out")
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        incidental = {"_commit_hash", "transformers_version", "vision_config"}
        for name in set(stored) - incidental:
            assert written[name] == stored[name], name
        shape = {name: value for name, value in stored["vision_config"].items() if not isinstance(value, dict | list)}
        for name in set(shape) - {"_attn_implementation_autoset", "add_cross_attention"}:
            assert written["vision_config"][name] == shape[name], name


class TestTower:
    def test_siglip_comes_back(self, start: Path, siglip: Path, tmp_path: Path) -> None:
        result = convert_tower(start, tmp_path / "tower")
        assert any("packing_position_embedding" in name for name in result.dropped)
        reference = SiglipModel.from_pretrained(siglip).vision_model
        again, info = SiglipVisionModel.from_pretrained(tmp_path / "tower", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        images, _ = pictures(2)
        with torch.no_grad():
            assert torch.equal(again(images).pooler_output, reference(images).pooler_output)

    def test_both_towers_of_stage_0(self, siglip: Path, tmp_path: Path) -> None:
        towers = initial_dual_encoder(recipe(siglip=str(siglip)), seed=0)
        save_export(towers.state_dict().items(), towers.config, tmp_path / "export")
        convert_tower(tmp_path / "export", tmp_path / "tower")
        again, info = SiglipModel.from_pretrained(tmp_path / "tower", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        for name, value in SiglipModel.from_pretrained(siglip).state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name

    @pytest.mark.parametrize("stage_0", [False, True])
    @pytest.mark.parametrize("fault", ["lacks a layer", "another shape", "unknown"])
    def test_what_is_no_whole_tower(self, tmp_path: Path, stage_0: bool, fault: str) -> None:
        make = initial_dual_encoder if stage_0 else initial_model
        model = make(recipe(random=True), seed=0)
        state = dict(model.named_parameters())
        layer = "visual.vision_model.encoder.layers.1."
        if fault == "lacks a layer":
            state = {name: value for name, value in state.items() if not name.startswith(layer)}
        else:
            state[f"{layer}mlp.fc1.bias" if fault == "another shape" else "adapter.weight"] = torch.ones(3)
        save_export(state.items(), model.config, tmp_path / "export")
        messages = {
            "lacks a layer": rf"{re.escape(layer)}.* missing",
            "another shape": r"layers\.1\.mlp\.fc1\.bias is \[3\], but config\.json",
            "unknown": r"adapter\.weight \[3\] has no place",
        }
        with pytest.raises(ValueError, match=messages[fault]):
            convert_tower(tmp_path / "export", tmp_path / "tower")
        assert not (tmp_path / "tower").exists()

    def test_a_caption_decoder_is_dropped(self, tmp_path: Path) -> None:
        towers = initial_dual_encoder(recipe(random=True), seed=0, captions=True)
        save_export(towers.state_dict().items(), towers.config, tmp_path / "export")
        dropped = convert_tower(tmp_path / "export", tmp_path / "tower").dropped
        assert {name.split(".")[0] for name in dropped} >= {"caption_decoder"}
        assert not any(name.startswith(("text_model.", "logit_")) for name in dropped)


def anonymous_bytes() -> int:
    """Memory of this process that no file backs: copies, not what is mapped from a checkpoint."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def test_no_second_copy_is_held(tmp_path: Path) -> None:
    """256 MiB from file to file in shards of 16 MiB: never more than a few shards in memory."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    source = tmp_path / "source"
    tensor = torch.ones(2**20)
    save_export(((f"t{i}", tensor) for i in range(64)), KeyeConfig(), source, 2**24)
    before, seen = anonymous_bytes(), []

    def watched() -> Iterator[tuple[str, Tensor]]:
        for name, value in read_state(source):
            seen.append(anonymous_bytes() - before)
            yield name, value

    save_export(watched(), KeyeConfig(), tmp_path / "out", 2**24)
    assert len(seen) == 64
    assert max(seen) < 96 * 2**20


class TestCommand:
    def run(self, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            convert_main([str(word) for word in words])
        out, err = capsys.readouterr()
        return left.value.code, out, err

    def test_the_whole_way(
        self, siglip: Path, qwen3: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        start = ("start", "--siglip", siglip, "--qwen3", qwen3, "--tokenizer", tokenizer, "--out", tmp_path / "a")
        code, out, _ = self.run(capsys, *start, "--dtype", "bfloat16")
        assert code == 0
        assert "dropped on purpose: 40" in out
        assert self.run(capsys, "export", tmp_path / "a", tmp_path / "b", "--shard-gb", 0.001)[0] == 0
        assert self.run(capsys, "import", tmp_path / "b", tmp_path / "c")[0] == 0
        assert self.run(capsys, "tower", tmp_path / "c", tmp_path / "d")[0] == 0
        first, last = dict(read_state(tmp_path / "a")), dict(read_state(tmp_path / "c"))
        assert all(torch.equal(value, first[name]) for name, value in last.items())
        code, out, _ = self.run(capsys, "inspect", tmp_path / "c")
        rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
        assert rows["model.layers.*"][0] == "22"
        assert rows["mlp_AR.linear_1"][1] == f"{128 * 128 + 128:,}"
        assert rows["total"][0] == str(len(first))
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "export").symlink_to(tmp_path / "c")
        assert self.run(capsys, "inspect", tmp_path / "run")[1] == out
        code, out, _ = self.run(capsys, "inspect", tmp_path / "b", "--tensors")
        assert re.search(r"model\.norm\.weight +\[16\] +BF16 +model-0000\d-of-0000\d\.safetensors", out)

    def test_mistakes_are_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code, _, err = self.run(capsys, "inspect", tmp_path)
        assert code == 2
        assert err.startswith("keye-convert: error:")
        assert len(err.splitlines()) == 1
        assert self.run(capsys, "import", tmp_path / "absent", tmp_path / "out")[0] == 2

    def test_inspect_reads_headers_only(self, tmp_path: Path) -> None:
        """A file whose data are cut to zeros still lists; 8 billion parameters must not be read to be counted."""
        save_file(
            {"a.weight": torch.ones(3, 5), "b": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors"
        )
        assert "2 tensors, 17 parameters in 1 files" in describe(tmp_path)
