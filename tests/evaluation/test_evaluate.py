"""Evaluation is deterministic, counts what it left out, agrees with the parts it is made of, and keeps what is done."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import png, question, toy_settings, write_exports, write_shard

from keye_train.evaluation import evaluate
from keye_train.evaluation.evaluate import question_text
from keye_train.evaluation.fingerprints import FILES
from keye_train.evaluation.heldout import read_tasks
from keye_train.evaluation.results import results_table
from keye_train.model.packed import IGNORE_INDEX
from keye_train.model.pretrained import load_export
from keye_train.model.sample_encoder import SampleEncoder
from keye_train.sample import Sample, SampleRef
from keye_train.settings import (
    DataSettings,
    EvaluationSettings,
    ModelSettings,
    ResolutionSettings,
    SettingsError,
    SourceSettings,
    ZeroshotSettings,
)

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
RESOLUTION = ResolutionSettings(image_min_tokens=4, image_max_tokens=16)


def colour_samples() -> list[dict[str, bytes]]:
    names = ["red", "green", "blue", "red", "red", "green"]
    return [question("Which colour?", name, png(COLOURS[name], (56 + 28 * i, 56))) for i, name in enumerate(names)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSettings, DataSettings, list[str]]:
    """Toy exports, two tasks and some pairs."""
    folder = tmp_path_factory.mktemp("world")
    model = toy_settings(folder / "tokenizer")
    broken = question("Which colour?", "red", b"no image")
    colours = write_shard(folder / "colour-0.tar", [*colour_samples(), broken], model.tokenizer)
    sums = write_shard(
        folder / "sum-0.tar", [question(f"{i} + 1 =", str(i + 1), metric="edit") for i in range(10)], model.tokenizer
    )
    pairs = write_shard(folder / "pairs-0.tar", colour_samples(), model.tokenizer)
    data = DataSettings(
        name="toy",
        root=str(folder),
        sources={},
        mixtures={},
        heldout={"colour": SourceSettings([str(colours)]), "sum": SourceSettings([str(sums)])},
        heldout_pairs=SourceSettings([str(pairs)]),
        zeroshot={
            "colour": ZeroshotSettings([str(pairs)], "answer", {name: [name] for name in COLOURS}, ["{}", "it is {}"])
        },
        resolution=RESOLUTION,
    )
    exports = write_exports(folder / "runs", model, {"towers": 0, "first": 1, "second": 2})
    return model, data, exports


def run(world: tuple[ModelSettings, DataSettings, list[str]], out: Path, **values: Any) -> dict[str, Any]:
    _, data, exports = world
    settings = EvaluationSettings(models=exports, data=data, out=str(out), max_new_tokens=4, batch_size=4)
    return json.loads(evaluate(replace(settings, **values), progress=False).read_text())


@pytest.fixture(scope="module")
def results(world: tuple[ModelSettings, DataSettings, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(world, tmp_path_factory.mktemp("out"))


class TestResults:
    def test_models_and_tasks_keep_their_order(self, results: Any) -> None:
        assert [model["name"] for model in results["models"]] == ["towers", "first", "second"]
        assert [task["name"] for task in results["tasks"]] == ["colour", "sum"]

    def test_chance_is_computed_on_the_samples_that_were_asked(self, results: Any) -> None:
        colour, total = results["tasks"]
        assert (colour["n"], colour["metric"], colour["chance"]) == (6, "exact", 0.5)
        assert (total["n"], total["metric"]) == (10, "edit")
        assert total["chance"] == pytest.approx((1 + 0.5) / 10)  # "1" is half of "10"

    def test_broken_sample_is_left_out_and_named(self, results: Any) -> None:
        (skipped,) = results["tasks"][0]["skipped"]
        assert skipped["shard"].endswith("colour-0.tar")
        assert skipped["reason"]

    def test_scores_are_those_of_the_samples(self, results: Any) -> None:
        model = results["models"][1]
        for task in ("colour", "sum"):
            scores = [sample["score"] for sample in model["samples"] if sample["task"] == task]
            result = model["tasks"][task]
            assert result["score"] == pytest.approx(sum(scores) / len(scores))
            assert result["low"] <= result["score"] <= result["high"]
        means = [result["score"] for result in model["tasks"].values()]
        assert model["mean_score"] == pytest.approx(sum(means) / 2)

    def test_dual_encoder_is_scored_on_retrieval_and_zero_shot_alone(self, results: Any) -> None:
        towers = results["models"][0]
        assert (towers["kind"], towers["tasks"]) == ("dual_encoder", {})
        assert towers["retrieval"]["n"] == 6
        assert towers["retrieval"]["image_to_text"]["r1"]["chance"] == pytest.approx(1 / 3)  # three captions
        assert towers["zeroshot"]["colour"]["n"] == 6
        assert towers["zeroshot"]["colour"]["chance"] == 0.5
        assert (results["models"][1]["retrieval"], results["models"][1]["zeroshot"]) == (None, None)
        shown = "".join(part.text for part in Console(width=200).render(results_table(results)))
        assert "0-shot colour" in shown
        assert "R@1 i>t" in shown
        answering = results["models"][1]
        assert f"{100 * answering['mean_low']:.1f}–{100 * answering['mean_high']:.1f}" in shown
        assert f"{answering['mean_loss']:.4f}" in shown
        alone = results | {"tasks": [], "models": [towers]}
        assert "chance" in "".join(part.text for part in Console(width=200).render(results_table(alone)))

    def test_loss_is_that_of_single_samples(self, world: Any, results: Any) -> None:
        settings, data, exports = world
        model = load_export(exports[1])
        processor = SampleEncoder.from_settings(settings, RESOLUTION)
        total, tokens = 0.0, 0
        for asked in read_tasks(data, 100, 0)["sum"].questions:
            encoded = processor.encode(asked.sample)
            with torch.no_grad():
                logits = model(input_ids=encoded.input_ids[None], position_ids=encoded.position_ids[:, None]).logits[0]
            targets = encoded.labels[1:]
            total += float(torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum"))
            tokens += int((targets != IGNORE_INDEX).sum())
        assert results["models"][1]["tasks"]["sum"]["loss_tokens"] == tokens
        assert results["models"][1]["tasks"]["sum"]["loss"] == pytest.approx(total / tokens, abs=1e-5)

    def test_a_model_is_right_when_its_own_answers_are_expected(self, world: Any, results: Any, tmp_path: Path) -> None:
        """Generation, decoding and scoring end to end."""
        settings, data, exports = world
        answers = {s["key"]: s["generated"] for s in results["models"][1]["samples"] if s["task"] == "colour"}
        assert all(answers.values()), "the toy model is expected to write something"
        samples = [
            question("Which colour?", "x", png(COLOURS["red"], (56 + 28 * i, 56)), answer=answers[f"{i:04d}"])
            for i, name in enumerate(["red", "green", "blue", "red", "red", "green"])
            if name == "red"
        ]
        shard = write_shard(tmp_path / "own.tar", samples, settings.tokenizer)
        own = replace(data, heldout={"own": SourceSettings([str(shard)])}, heldout_pairs=None)
        again = run((settings, own, exports[1:2]), tmp_path / "out")
        assert again["models"][0]["mean_score"] == 1.0


class TestRepetition:
    def test_same_numbers_again(self, world: Any, results: Any, tmp_path: Path) -> None:
        again = run(world, tmp_path)
        for left, right in zip(results["models"], again["models"], strict=True):
            assert {k: v for k, v in left.items() if k != "seconds"} == {
                k: v for k, v in right.items() if k != "seconds"
            }

    def test_finished_results_are_kept(self, world: Any, tmp_path: Path) -> None:
        def cached() -> list[Path]:
            return sorted(file for file in (tmp_path / "cache").iterdir() if file.name != FILES)

        run((*world[:2], world[2][:2]), tmp_path)
        first = cached()
        stamps = [file.stat().st_mtime_ns for file in first]
        more = run(world, tmp_path)
        assert [file.stat().st_mtime_ns for file in first] == stamps
        assert len(cached()) == 3
        assert [task["name"] for task in more["tasks"]] == ["colour", "sum"]
        run(world, tmp_path, max_new_tokens=3)  # another setting is another result
        assert len(cached()) == 6

    def test_draw_is_seeded_and_without_replacement(self, world: Any) -> None:
        _, data, _ = world

        def keys(seed: int) -> list[str]:
            return [q.sample.ref.key for q in read_tasks(data, 5, seed)["sum"].questions]

        assert keys(0) == keys(0)
        assert len(set(keys(0))) == 5
        assert len({tuple(keys(seed)) for seed in range(5)}) > 1


class TestRefusal:
    def test_shard_without_index(self, world: Any, tmp_path: Path) -> None:
        _, data, _ = world
        (tmp_path / "bare.tar").write_bytes(b"")
        bare = replace(data, heldout={"bare": SourceSettings([str(tmp_path / "bare.tar")])})
        with pytest.raises(SettingsError, match=r"bare\.tar has no index; run: keye-data index"):
            read_tasks(bare, 1, 0)

    def test_missing_shard(self, world: Any, tmp_path: Path) -> None:
        _, data, _ = world
        with pytest.raises(SettingsError, match=r"gone\.tar"):
            read_tasks(replace(data, heldout={"gone": SourceSettings([str(tmp_path / "gone.tar")])}), 1, 0)

    def test_nothing_to_ask(self, world: Any, tmp_path: Path) -> None:
        nothing = replace(world[1], heldout={}, heldout_pairs=None, zeroshot={})
        with pytest.raises(SettingsError, match="has no held-out samples"):
            evaluate(EvaluationSettings(models=world[2], data=nothing, out=str(tmp_path)), progress=False)

    def test_task_of_broken_samples(self, world: Any, tmp_path: Path) -> None:
        shard = write_shard(tmp_path / "x.tar", [question("?", "red", b"no image")], world[0].tokenizer)
        broken = replace(world[1], heldout={"broken": SourceSettings([str(shard)])})
        with pytest.raises(SettingsError, match=r"data\.heldout\.broken: none"):
            evaluate(EvaluationSettings(models=world[2], data=broken, out=str(tmp_path)), progress=False)

    @pytest.mark.parametrize("members", [{"0.png": b"no image"}, {"json": b"{"}], ids=["picture", "record"])
    def test_pairs_that_are_all_broken(self, world: Any, tmp_path: Path, members: dict[str, bytes]) -> None:
        """Else the table would lack the retrieval that the recipe asks for, and nobody would know why."""
        shard = write_shard(tmp_path / "x.tar", [question("", "red", b"no image") | members], world[0].tokenizer)
        broken = replace(world[1], heldout_pairs=SourceSettings([str(shard)]))
        with pytest.raises(SettingsError, match=r"data\.heldout_pairs: none"):
            evaluate(EvaluationSettings(models=world[2], data=broken, out=str(tmp_path)), progress=False)

    def test_missing_model(self, world: Any, tmp_path: Path) -> None:
        settings = EvaluationSettings(models=[str(tmp_path / "nowhere")], data=world[1], out=str(tmp_path))
        with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
            evaluate(settings, progress=False)


def test_question_text() -> None:
    content = [{"type": "image", "image": "0"}, {"type": "text", "text": " Same? "}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    assert question_text(Sample(SampleRef("", "", ""), messages)) == "[image] Same?"
