"""Zero-shot accuracy on hand-worked vectors; which samples belong to a task; prompts are averaged by class."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch
from tiny import png, question, toy_settings, write_exports, write_shard

from keye_train.evaluation.zeroshot import class_vectors, read_zeroshot, zeroshot_scores
from keye_train.model.pretrained import load_dual_encoder
from keye_train.model.sample_encoder import SampleEncoder
from keye_train.settings import DataSettings, ResolutionSettings, SettingsError, ZeroshotSettings
from keye_train.settings.data import check_data

RED = png((220, 20, 20))


def data(task: ZeroshotSettings) -> DataSettings:
    return DataSettings(name="toy", root="", sources={}, mixtures={}, zeroshot={"shape": task})


def task(**values: object) -> ZeroshotSettings:
    fields = {
        "shards": [],
        "label": "made_from.objects.shape",
        "classes": {"square": ["square", "box"], "circle": ["circle"]},
        "prompts": ["a {}", "one {} alone"],
    }
    return ZeroshotSettings(**(fields | values))  # type: ignore[arg-type]


class TestScores:
    def test_hand_worked(self) -> None:
        images = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1], [0.1, 1.0], [0.9, 0.2], [0.8, 0.1]]), dim=-1)
        scores = zeroshot_scores(images, torch.eye(2), [0, 1, 1, 0])
        assert (scores["score"], scores["n"], scores["classes"], scores["chance"]) == (0.75, 4, 2, 0.5)
        assert scores["low"] <= 0.75 <= scores["high"]

    def test_ties_count_against_the_model(self) -> None:
        assert zeroshot_scores(torch.ones(3, 2), torch.ones(2, 2), [0, 1, 0])["score"] == 0.0

    def test_chance_is_the_most_frequent_class(self) -> None:
        assert zeroshot_scores(torch.eye(4), torch.eye(4), [0, 0, 0, 3])["chance"] == 0.75


class TestTask:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("zeroshot")

    @pytest.fixture(scope="class")
    def shard(self, folder: Path) -> str:
        shapes = [["square"], ["circle"], ["square", "square"], ["square", "circle"], ["star"], []]
        records = [{"objects": [{"shape": shape} for shape in found]} for found in shapes]
        samples = [question("?", "a picture", RED, made_from=record) for record in records]
        model = toy_settings(folder / "tokenizer")
        return str(write_shard(folder / "shapes-0.tar", [*samples, question("?", "no", RED)], model.tokenizer))

    def test_only_samples_that_show_one_class(self, shard: str) -> None:
        found = read_zeroshot(data(task(shards=[shard])), 100, seed=0)["shape"]
        assert [found.classes[label] for label in found.labels] == ["square", "circle", "square"]
        assert found.prompts[0] == ["a square", "a box", "one square alone", "one box alone"]

    def test_as_many_as_asked_for(self, shard: str) -> None:
        assert len(read_zeroshot(data(task(shards=[shard])), 2, seed=0)["shape"].samples) == 2

    def test_only_the_media_of_the_drawn_are_kept(self, folder: Path) -> None:
        """A classification set has more pictures than memory; only those that are asked stay."""
        size = 2**20
        record = {"objects": [{"shape": "circle"}]}
        samples = [question("?", "a picture", RED + bytes(size), made_from=record) for _ in range(16)]
        model = toy_settings(folder / "tokenizer")
        shard = str(write_shard(folder / "large-0.tar", samples, model.tokenizer))
        tracemalloc.start()
        try:
            found = read_zeroshot(data(task(shards=[shard])), 2, seed=0)["shape"]
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert [len(picture) > size for sample in found.samples for picture in sample.media.values()] == [True, True]
        assert peak < 10 * size, "two samples, and what the reading of one takes"

    def test_no_sample_of_any_class_is_an_error(self, shard: str) -> None:
        with pytest.raises(SettingsError, match=r"zeroshot\.shape.*under 'made_from\.kind'"):
            read_zeroshot(data(task(shards=[shard], label="made_from.kind")), 100, seed=0)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"classes": {"square": ["square"]}}, "at least two classes"),
            ({"prompts": ["a picture"]}, "needs {} once"),
            ({"prompts": ["a {name}"]}, "needs {} once"),
        ],
    )
    def test_impossible_settings(self, values: dict, message: str) -> None:
        with pytest.raises(SettingsError, match=message):
            check_data(data(task(**values)))

    def test_a_class_is_the_mean_of_its_prompts(self, folder: Path) -> None:
        settings = toy_settings(folder / "tokenizer")
        (export,) = write_exports(folder / "runs", settings, {"towers": 0})
        model, processor = load_dual_encoder(export), SampleEncoder.from_settings(settings, ResolutionSettings())
        single = class_vectors(model, processor, [["a square"], ["one box"], ["a circle"]])
        both = class_vectors(model, processor, [["a square", "one box"], ["a circle"]])
        assert torch.allclose(both[0], torch.nn.functional.normalize(single[0] + single[1], dim=0), atol=1e-6)
        assert torch.allclose(both[1], single[2], atol=1e-6)
