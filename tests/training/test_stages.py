"""From stage to stage: what is taken over, what trains, what stays as it is, and which parents are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from corpus import ToyCorpus
from safetensors.torch import load_file
from torch import Tensor

from keye_train import compose, runs
from keye_train.settings import TrainSettings
from keye_train.training.build import count_parameters, meta_model
from keye_train.training.trainer import train


def weights(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / runs.EXPORT / "model.safetensors")


@pytest.fixture(scope="module")
def stage0(toy_corpus: ToyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "stage0"
    assert train(toy_corpus.settings("0_vision", run_dir, "stage.max_tokens=48", "logging.tensorboard=true")) == 0
    return run_dir


@pytest.fixture(scope="module")
def stage1(toy_corpus: ToyCorpus, stage0: Path) -> Path:
    run_dir = stage0.with_name("stage1")
    assert train(toy_corpus.settings("1_align", run_dir, f"parent={stage0}")) == 0
    return run_dir


def test_stage_0_learns_and_logs_what_is_its_own(stage0: Path) -> None:
    rows = runs.read_jsonl(stage0 / runs.METRICS)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0]["pairs"] == 16  # 4 packs of 48 / 12 captions
    assert all(0 <= row["retrieval_accuracy"] <= 1 and row["logit_scale"] > 9 for row in rows)
    assert list((stage0 / "tensorboard").glob("events.*"))


@pytest.mark.parametrize("trainable", ["vision", "text_tower"])
def test_either_tower_of_stage_0_may_be_frozen(toy_corpus: ToyCorpus, tmp_path: Path, trainable: str) -> None:
    more = ("stage.max_tokens=48", f"stage.trainable=[{trainable}]", "deepspeed.zero_stage=2")
    assert train(toy_corpus.settings("0_vision", tmp_path / "long", *more)) == 0
    assert train(toy_corpus.settings("0_vision", tmp_path / "short", *more, "stage.steps=1")) == 0
    long, short = weights(tmp_path / "long"), weights(tmp_path / "short")
    moved = {name for name in long if not torch.equal(long[name], short[name])}
    assert moved
    # Temperature and bias belong to the text tower: frozen with it, as SigLIP left them.
    assert {name.startswith("visual.") for name in moved} == {trainable == "vision"}


@pytest.mark.slow
def test_compiled_layers_train_alike(toy_corpus: ToyCorpus, tmp_path: Path) -> None:
    for name, switch in (("plain", "false"), ("compiled", "true")):
        more = (f"stage.compile_layers={switch}", "deepspeed.zero_stage=2", "deepspeed.precision=fp32")
        assert train(toy_corpus.settings("1_align", tmp_path / name, *more)) == 0
    plain, compiled = (runs.read_jsonl(tmp_path / name / runs.METRICS) for name in ("plain", "compiled"))
    assert [row["loss"] for row in compiled] == pytest.approx([row["loss"] for row in plain], rel=1e-4)


def test_stage_0_can_read_captions_too(toy_corpus: ToyCorpus, stage0: Path, tmp_path: Path) -> None:
    """The caption loss is added with its weight, and its decoder stays behind when the next stage takes the tower."""
    more = ("stage.max_tokens=48", "stage.caption_weight=2", "stage.trainable=[vision,text_tower,caption_decoder]")
    assert train(toy_corpus.settings("0_vision", tmp_path / "0", *more)) == 0
    rows, plain = (runs.read_jsonl(folder / runs.METRICS) for folder in (tmp_path / "0", stage0))
    assert rows[0]["loss"] == pytest.approx(plain[0]["loss"] + 2 * rows[0]["caption_loss"], rel=1e-3)
    assert rows[-1]["caption_loss"] < rows[0]["caption_loss"]
    assert any(name.startswith("caption_decoder.") for name in weights(tmp_path / "0"))
    assert train(toy_corpus.settings("1_align", tmp_path / "1", f"parent={tmp_path / '0'}", "stage.steps=1")) == 0
    assert not any(name.startswith("caption_decoder.") for name in weights(tmp_path / "1"))


def test_stage_1_takes_the_tower_and_trains_the_projector_only(stage0: Path, stage1: Path) -> None:
    before, after = weights(stage0), weights(stage1)
    tower = [name for name in before if name.startswith("visual.")]
    assert tower
    assert [name for name in tower if not torch.equal(before[name], after[name])] == []
    assert not any(name.startswith("text_model.") for name in after)
    parent = runs.read_json(stage1 / runs.MANIFEST)["parent"]
    assert parent["path"] == str(stage0)
    assert parent["fingerprint"] == runs.read_json(stage0 / runs.MANIFEST)["export_fingerprint"]


@pytest.mark.parametrize("precision", ["bf16", "bf16_autocast", "fp32"])
def test_frozen_tensors_are_the_parents_bit_for_bit(
    toy_corpus: ToyCorpus, stage1: Path, tmp_path: Path, precision: str
) -> None:
    more = ("stage.trainable=[projector]", "stage.optimizer.module_lr.vision=null", "stage.steps=2")
    sharding = ("deepspeed.zero_stage=3", f"deepspeed.precision={precision}")
    recipe = toy_corpus.settings("2_multitask", tmp_path, f"parent={stage1}", *more, *sharding)
    assert train(recipe) == 0
    before, after = weights(stage1), weights(tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("mlp_AR.")}


def test_a_run_is_the_same_for_the_same_seed_only(toy_corpus: ToyCorpus, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert train(toy_corpus.settings("1_align", tmp_path / name, "stage.steps=1", f"seed={seed}")) == 0
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])


class TestUnfitParents:
    def test_another_shape_names_tensor_and_setting(self, toy_corpus: ToyCorpus, stage1: Path, tmp_path: Path) -> None:
        recipe = toy_corpus.settings("2_multitask", tmp_path, f"parent={stage1}", "model.language.intermediate_size=64")
        with pytest.raises(ValueError, match=r"mlp\.\w+_proj\.weight has the shape .* check model\.language\.interm"):
            train(recipe)

    def test_same_shapes_other_meaning(self, toy_corpus: ToyCorpus, stage1: Path, tmp_path: Path) -> None:
        recipe = toy_corpus.settings("2_multitask", tmp_path, f"parent={stage1}", "model.language.rope_theta=5000")
        with pytest.raises(ValueError, match=r"rope_theta=10000\.0 in config\.json, this recipe 5000"):
            train(recipe)

    def test_another_tokenizer(self, toy_corpus: ToyCorpus, stage1: Path, tmp_path: Path) -> None:
        foreign = tmp_path / "foreign"
        shutil.copytree(stage1 / runs.EXPORT, foreign)
        tokenizer = json.loads((foreign / "tokenizer.json").read_text())
        (foreign / "tokenizer.json").write_text(json.dumps(tokenizer | {"truncation": None, "version": "1.1"}))
        recipe = toy_corpus.settings("2_multitask", tmp_path / "run", f"parent={foreign}")
        with pytest.raises(ValueError, match=r"another tokenizer\.json"):
            train(recipe)

    def test_none_there(self, toy_corpus: ToyCorpus, tmp_path: Path) -> None:
        recipe = toy_corpus.settings("1_align", tmp_path / "run", f"parent={tmp_path / 'nowhere'}")
        with pytest.raises(FileNotFoundError, match=r"parent=.*does not exist"):
            train(recipe)
        assert not (tmp_path / "run").exists()

    def test_a_parent_that_changed_under_a_run(self, toy_corpus: ToyCorpus, stage1: Path, tmp_path: Path) -> None:
        parent, run_dir = tmp_path / "parent", tmp_path / "run"
        shutil.copytree(stage1 / runs.EXPORT, parent)
        recipe = toy_corpus.settings("2_multitask", run_dir, f"parent={parent}", "stage.steps=2")
        assert train(recipe) == 0
        shutil.copyfile(stage1.with_name("stage1") / runs.EXPORT / "config.json", parent / "config.json")
        config = json.loads((parent / "config.json").read_text())
        (parent / "config.json").write_text(json.dumps(config | {"changed": True}))
        before = sorted(path.name for path in (run_dir / runs.CHECKPOINTS).iterdir())
        assert before == ["step-2"]
        with pytest.raises(ValueError, match=r"has changed since the run .*\(it was .*, it is "):
            train(recipe)
        assert sorted(path.name for path in (run_dir / runs.CHECKPOINTS).iterdir()) == before
        (run_dir / runs.MANIFEST).unlink()  # only the checkpoint itself knows its parent now
        with pytest.raises(ValueError, match=r"none of its 1 whole checkpoints is of this run \(step-2: its parent is"):
            train(recipe)
        assert sorted(path.name for path in (run_dir / runs.CHECKPOINTS).iterdir()) == before


@pytest.mark.parametrize(
    ("stage", "trainable"),
    [
        ("1_align", {"projector": 40_119_040}),
        ("2_multitask", {"vision": 412_987_248, "projector": 40_119_040, "language": 8_190_735_360}),
    ],
)
def test_stages_of_the_8b_model_train_the_right_parameters(stage: str, trainable: dict[str, int]) -> None:
    names = ["model.tokenizer=t", "model.start.siglip=s", "model.start.qwen3=q", f"stage={stage}"]
    recipe = compose.load_settings(TrainSettings, "train", [*names, "model=keye_8b", "data=keye_example"])
    counts = count_parameters(meta_model(recipe))
    assert counts["trainable"] == trainable
    assert sum(sum(modules.values()) for modules in counts.values()) == 8_696_828_736
