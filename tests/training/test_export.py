"""Promise: an export reads a conversation as its training did, and so does what is made of it."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from corpus import ToyCorpus
from transformers import AutoProcessor

import keye_train.model.auto  # noqa: F401 (registers Keye)
from keye_train import runs
from keye_train.compose import choices, load_resolution
from keye_train.data.formats import parse_sample
from keye_train.evaluation.exports import opened_exports
from keye_train.evaluation.fingerprints import FileHashes
from keye_train.merging import merge
from keye_train.model.convert import convert_export, convert_import
from keye_train.model.image_processor import KeyeImageProcessor
from keye_train.model.media_options import video_limits, with_video_limits
from keye_train.model.sample_encoder import SampleEncoder
from keye_train.sample import Sample, SampleRef
from keye_train.settings import MergeSettings, ResolutionSettings
from keye_train.training.export import write_start
from keye_train.training.trainer import train

BUDGETS = ("data.resolution.image_max_tokens=6", "data.resolution.video_fps=4")  # not those of the corpus


@pytest.fixture(scope="module")
def trained(toy_corpus: ToyCorpus, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two branches."""
    folders = [tmp_path_factory.mktemp("branches") / name for name in "ab"]
    for seed, folder in enumerate(folders):
        assert train(toy_corpus.settings("1_align", folder, "stage.steps=1", f"seed={seed}", *BUDGETS)) == 0
    return folders


def members(shard: Path, key: str) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {
            info.name.partition(".")[2]: tar.extractfile(info).read()  # type: ignore[union-attr]
            for info in tar
            if info.name.startswith(f"{key}.")
        }


@pytest.fixture(scope="module")
def sample(toy_corpus: ToyCorpus) -> Sample:
    """A clip and a picture of the corpus in one conversation."""
    found = [
        parse_sample(SampleRef(name, name, "0"), members(toy_corpus.folder / f"{name}-0.tar", "000000000"))
        for name in ("clips", "images")
    ]
    media = {name: data for one in found for name, data in one.media.items()}
    return replace(found[0], messages=[message for one in found for message in one.messages], media=media)


def assert_reads_as_trained(folder: Path, toy_corpus: ToyCorpus, sample: Sample) -> None:
    settings = toy_corpus.settings("1_align", folder, *BUDGETS)
    trained = SampleEncoder.from_settings(settings.model, settings.data.resolution).encode(sample)
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.resolution == settings.data.resolution
    batch = processor.apply_chat_template(
        [
            {
                "role": message["role"],
                "content": message["content"]
                if isinstance(message["content"], str)
                else [
                    part if part["type"] == "text" else part | {part["type"]: sample.media[part[part["type"]]]}
                    for part in message["content"]
                ],
            }
            for message in sample.messages
        ],
        tokenize=True,
        return_dict=True,
        return_labels=True,
        return_position_ids=True,
    )
    assert torch.equal(batch["input_ids"][0], trained.input_ids)
    assert torch.equal(batch["labels"][0], trained.labels)
    assert torch.equal(batch["position_ids"][:, 0], trained.position_ids)
    assert torch.cat([batch["video_grid_thw"], batch["image_grid_thw"]]).equal(trained.grid_thw)
    levels = torch.cat([batch["pixel_values_videos"], batch["pixel_values"]])
    assert ((levels + 1) * 127.5).round().to(torch.uint8).equal(trained.pixel_patches)


def test_the_export_of_a_run(trained: list[Path], toy_corpus: ToyCorpus, sample: Sample) -> None:
    assert_reads_as_trained(trained[0] / runs.EXPORT, toy_corpus, sample)


def test_the_merge_of_two(trained: list[Path], toy_corpus: ToyCorpus, sample: Sample, tmp_path: Path) -> None:
    out = merge(MergeSettings(models=[str(folder) for folder in trained], out=str(tmp_path / "merge")), progress=False)
    assert_reads_as_trained(out, toy_corpus, sample)


def test_the_published_layout_and_back(
    trained: list[Path], toy_corpus: ToyCorpus, sample: Sample, tmp_path: Path
) -> None:
    convert_export(trained[0], tmp_path / "published")
    convert_import(tmp_path / "published", tmp_path / "back")
    for folder in ("published", "back"):
        assert_reads_as_trained(tmp_path / folder, toy_corpus, sample)


def test_the_untrained_model_of_a_chain_follows_its_recipe(
    toy_corpus: ToyCorpus, sample: Sample, tmp_path: Path
) -> None:
    write_start(toy_corpus.settings("1_align", tmp_path / "run"), tmp_path)
    write_start(toy_corpus.settings("1_align", tmp_path / "run", *BUDGETS), tmp_path)  # replaces it
    assert_reads_as_trained(tmp_path / runs.EXPORT, toy_corpus, sample)


@pytest.mark.parametrize("name", choices("resolution"))
def test_budgets_come_back_from_their_files(name: str) -> None:
    budgets = load_resolution(name)
    videos = with_video_limits(ResolutionSettings(), video_limits(budgets))
    assert KeyeImageProcessor.from_resolution(budgets).resolution(videos) == budgets


def test_a_checkpoint_is_evaluated_as_the_export_of_its_step(trained: list[Path], tmp_path: Path) -> None:
    checkpoint = next((trained[0] / runs.CHECKPOINTS).glob("step-*"))
    named = {"a": str(trained[0]), "a/step-1": str(checkpoint)}
    with opened_exports(named, tmp_path / "out") as exports:
        own, early = (exports[path] for path in named.values())
        assert (early.name, early.config) == ("a/step-1", own.config)
        cache = FileHashes(tmp_path / "cache")
        assert early.fingerprint(cache) == own.fingerprint(cache)
    assert not list((tmp_path / "out").iterdir())
