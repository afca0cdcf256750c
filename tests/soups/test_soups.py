"""A candidate that was scored is the model that is written; the search does not grade itself; what is known is kept."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import png, question, toy_settings, write_exports, write_shard

from keye_train.cli.soups import COMMANDS
from keye_train.evaluation import evaluate, fingerprints
from keye_train.evaluation.candidates import CandidateScorer, Values
from keye_train.evaluation.exports import Export
from keye_train.merging import merge
from keye_train.merging.blend import Blend
from keye_train.merging.sources import opened
from keye_train.report.lines import soup_lines
from keye_train.report.merge_page import write_merge_page
from keye_train.runs import file_sha256, read_json
from keye_train.settings import (
    CurveSettings,
    DataSettings,
    EvaluationSettings,
    MergeMethod,
    MergeSettings,
    ResolutionSettings,
    SettingsError,
    SoupMethod,
    SoupMetric,
    SoupSettings,
    SourceSettings,
)
from keye_train.soups import draw_curve, search_soup
from keye_train.soups.bootstrap import resample
from keye_train.soups.curve import line_places
from keye_train.soups.search import Trials, exact, greedy, nelder_mead, normalised
from keye_train.soups.soup import judge, split

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataSettings, list[str]]:
    """Three siblings of one random parent in bf16, and two tasks of twelve samples; one sample stands twice."""
    folder = tmp_path_factory.mktemp("world")
    model = toy_settings(folder / "tokenizer")
    names = [list(COLOURS)[i % 3] for i in range(12)]
    shown = [
        question("Which colour?", name, png(COLOURS[name], (56 + 28 * (i // 3), 56))) for i, name in enumerate(names)
    ]
    colours = write_shard(folder / "colour-0.tar", shown, model.tokenizer)
    sums = write_shard(
        folder / "sum-0.tar", [question(f"{i} + 1 =", str(i + 1), metric="edit") for i in range(12)], model.tokenizer
    )
    data = DataSettings(
        name="toy",
        root=str(folder),
        sources={},
        mixtures={},
        heldout={"colour": SourceSettings([str(colours)]), "sum": SourceSettings([str(sums)])},
        resolution=ResolutionSettings(image_min_tokens=4, image_max_tokens=16),
    )
    exports = write_exports(folder / "runs", model, {"a": 1, "b": 1, "c": 1})
    for seed, export in enumerate(exports):
        file = Path(export) / "model.safetensors"
        draw = torch.Generator().manual_seed(seed)
        state = {
            name: (value.float() + 0.05 * torch.randn(value.shape, generator=draw)).bfloat16()
            for name, value in load_file(file).items()
        }
        save_file(state, file, {"format": "pt"})
    return data, exports


def soup(world: Any, out: Path, **values: Any) -> SoupSettings:
    data, exports = world
    wanted = SoupSettings(models=exports, data=data, out=str(out), samples_per_task=6, selection_per_task=6, budget=14)
    return replace(wanted, **values)


def blend(models: list[str], weights: list[float]) -> dict[str, torch.Tensor]:
    with opened(models) as readers:
        return dict(Blend(readers).tensors(weights))


@pytest.fixture(scope="module")
def searched(world: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("soup")
    return out, json.loads(search_soup(soup(world, out), progress=False).read_text())


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.2137, 0.0, 0.7863], [0.0, 1.0, 0.0]])
def test_a_blend_is_the_merge_bit_for_bit(world: Any, tmp_path: Path, weights: list[float]) -> None:
    _, exports = world
    wanted = MergeSettings(models=exports, out=str(tmp_path / "m"), method=MergeMethod.weighted, weights=weights)
    written = load_file(merge(wanted, progress=False) / "model.safetensors")
    blended = blend(exports, weights)
    assert written.keys() == blended.keys()
    assert all(torch.equal(written[name], blended[name]) for name in written)


def test_a_candidate_in_memory_scores_what_keye_eval_gives_its_export(world: Any, tmp_path: Path) -> None:
    data, exports = world
    weights = [0.5, 0.3, 0.2]
    folder = merge(
        MergeSettings(models=exports, out=str(tmp_path / "m"), method=MergeMethod.weighted, weights=weights), False
    )
    asked = EvaluationSettings(models=[str(folder)], data=data, out=str(tmp_path / "e"), samples_per_task=6)
    (model,) = json.loads(evaluate(replace(asked, max_new_tokens=4), progress=False).read_text())["models"]
    for metric, key in ((SoupMetric.loss, "mean_loss"), (SoupMetric.score, "mean_score")):
        settings = soup(world, tmp_path / "s", metric=metric, max_new_tokens=4)
        confirming, _ = split(settings)
        scorer = CandidateScorer(Export.open("a", exports[0]), confirming, data, settings, progress=False)
        assert scorer.score(blend(exports, weights).items()).mean() == pytest.approx(model[key], rel=1e-6)


def test_the_uniform_candidate_is_the_uniform_merge(world: Any, tmp_path: Path) -> None:
    _, exports = world
    written = load_file(merge(MergeSettings(models=exports, out=str(tmp_path / "m")), False) / "model.safetensors")
    thirds = exact(normalised([1.0, 1.0, 1.0]))
    blended = blend(exports, thirds)
    assert all(torch.equal(written[name], blended[name]) for name in written)
    assert exact((0.25, 0.75)) == [0.25, 0.75]


def test_selection_and_confirmation_share_no_sample(world: Any, tmp_path: Path) -> None:
    confirming, selecting = split(soup(world, tmp_path))
    for task in confirming:
        ours = {one.sample.ref.key for one in confirming[task].questions}
        theirs = {one.sample.ref.key for one in selecting[task].questions}
        assert len(ours) == len(theirs) == 6
        assert not ours & theirs
    with pytest.raises(SettingsError, match="samples_per_task=12 leaves nothing to select by"):
        split(soup(world, tmp_path, samples_per_task=12))


def test_a_confirmation_sample_is_known_under_another_key_and_other_names(world: Any, tmp_path: Path) -> None:
    data, exports = world
    picture = png((10, 20, 30))
    again = question("Which colour?", "dark", picture, id="copied")
    record = again["json"].replace(b'"0.png"', b'"again.png"')
    twin = {"json": record, "again.png": picture}
    shard = write_shard(tmp_path / "x.tar", [question("Which colour?", "dark", picture), twin], exports[0])
    twice = replace(data, heldout={"x": SourceSettings([str(shard)])})
    with pytest.raises(SettingsError, match="every selection sample also confirms"):
        split(soup((twice, exports), tmp_path, samples_per_task=1, selection_per_task=1))
    other = write_shard(tmp_path / "y.tar", [again, question("Which colour?", "dark", png((10, 20, 31)))], exports[0])
    differ = replace(data, heldout={"x": SourceSettings([str(other)])})
    _, selecting = split(soup((differ, exports), tmp_path, samples_per_task=1, selection_per_task=1))
    assert len(selecting["x"].questions) == 1


def test_the_result_says_what_was_found_and_accepts_only_what_is_better(searched: Any) -> None:
    out, result = searched
    names = [row["name"] for row in result["rows"]]
    assert names == ["a", "b", "c", "uniform", "soup_greedy", "soup_weights"]
    assert len(result["trials"]) <= 14
    parts = [row["metric"] for row in result["rows"][:3]]
    assert result["parts_mean"]["metric"] == pytest.approx(sum(parts) / 3)
    for row in result["rows"]:
        gain = row["gains"]["parts_mean"]
        assert gain["gain"] == pytest.approx(result["parts_mean"]["metric"] - row["metric"])
        assert gain["low"] <= gain["gain"] <= gain["high"]
        if row["name"].startswith("soup_"):
            assert row["accepted"] == (gain["low"] > 0)
            assert (out / row["name"] / "manifest.json").exists() == row["accepted"]
    best = min(result["trials"], key=lambda trial: trial["metric"])
    assert result["rows"][-1]["weights"] == best["weights"]


def test_searched_soups_are_judged_against_the_uniform_mean_which_decides_nothing(world: Any, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    hard, noise = draw.gamma(1.0, size=200), draw.normal(size=200)
    columns: dict[
        str, tuple[list[float], Any]
    ] = {  # loss of each candidate less that of the samples; the parts' mean is worse than all averages
        "a": ([1.0, 0.0], 0.3),
        "b": ([0.0, 1.0], 0.4),
        "uniform": ([0.5, 0.5], 0.1),
        "twin": ([0.5, 0.5], 0.1),
        "better": ([0.6, 0.4], 0.05),
        "worse": ([0.7, 0.3], 0.15),
        "level": ([0.4, 0.6], 0.1 + 0.01 * (noise - noise.mean())),
    }
    values = [Values({"x": hard + more}, {"x": np.ones(200)}) for _, more in columns.values()]
    candidates = {name: tuple(weights) for name, (weights, _) in columns.items()}
    rows = judge(candidates, values, 2, 0, soup(world, tmp_path))["rows"]
    told = [None, None, None, "same weights", "better", "worse", "no difference"]
    assert [row["against_uniform"] for row in rows] == told
    assert [row["accepted"] for row in rows] == [None, None, True, True, True, True, True]
    level = rows[-1]["gains"]["uniform"]
    assert level["low"] < 0 < level["high"]


def test_the_command_prints_what_the_file_holds(searched: Any, world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out, result = searched
    assert COMMANDS["search"].work(soup(world, out)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(soup_lines(result, out / "soup.json") + "\npage:")
    assert "uniform" in printed


def test_a_second_search_computes_nothing_and_one_that_was_cut_goes_on(
    searched: Any, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = searched
    scored: list[int] = []
    original = CandidateScorer.score
    monkeypatch.setattr(CandidateScorer, "score", lambda self, state: (scored.append(1), original(self, state))[1])
    cut = soup(world, tmp_path, budget=9)
    assert json.loads(search_soup(cut, progress=False).read_text())["stopped"] == "budget"
    before = len(scored)
    result = json.loads(search_soup(replace(cut, budget=14), progress=False).read_text())
    assert (result["trials"], result["rows"]) == (whole["trials"], whole["rows"])
    new = len(scored) - before
    assert 0 < new <= len(whole["trials"]) - 9 + 2  # and the two soups that the confirmation may not know yet
    scored.clear()
    turned = replace(cut, budget=14, models=[str(Path(m)) for m in cut.models])
    search_soup(turned, progress=False)
    assert not scored


def test_a_soup_that_is_no_longer_accepted_is_removed(searched: Any, world: Any, tmp_path: Path) -> None:
    from keye_train.soups.soup import _place

    settings = soup(world, tmp_path)
    folder = tmp_path / "soup_greedy"
    assert _place(folder, settings, (0.5, 0.5, 0.0), False) == folder
    assert _place(folder, settings, (0.0, 0.5, 0.5), False) == folder
    assert json.loads((folder / "manifest.json").read_text())["request"]["weights"] == [0.0, 1.0, 1.0]
    written = (folder / "manifest.json").stat().st_mtime_ns
    assert _place(folder, settings, (0.0, 0.5, 0.5), False) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == written  # it is that very soup
    moved = [str(shutil.copytree(model, tmp_path / "moved" / Path(model).name)) for model in settings.models]
    assert _place(folder, replace(settings, models=moved), (0.0, 0.5, 0.5), False) == folder
    assert str(tmp_path / "moved") in json.loads((folder / "manifest.json").read_text())["request"]["models"][0]
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    (pickles / "model.bin").touch()
    with pytest.raises(SettingsError, match=r"model\.bin, a pickle"):  # says nothing about what stands there
        _place(folder, replace(settings, models=[str(pickles), *moved[1:]]), (0.0, 0.5, 0.5), False)
    assert (folder / "manifest.json").exists()
    assert _place(folder, settings, None, False) is None
    assert not folder.exists()


def test_greedy_keeps_what_improves_and_simplex_finds_the_minimum_of_a_bowl() -> None:
    best = np.array([0.6, 0.3, 0.1])

    def bowl(weights: Any) -> float:
        return float(((np.array(weights) - best) ** 2).sum())

    trials = Trials(bowl, SoupMetric.loss, budget=120)
    assert greedy(trials, 3) == (0.5, 0.5, 0.0)  # a, then a + b is better, then the third makes it worse
    nelder_mead(trials, 3, 1e-9)
    assert np.abs(np.array(trials.best().weights) - best).max() < 0.01
    assert all(min(trial.weights) >= 0 and abs(sum(trial.weights) - 1) < 1e-3 for trial in trials.done)
    upside = Trials(lambda weights: -bowl(weights), SoupMetric.score, budget=120)
    assert greedy(upside, 3) == (0.5, 0.5, 0.0)
    short = Trials(bowl, SoupMetric.loss, budget=8)
    greedy(short, 3)
    nelder_mead(short, 3, 1e-9)
    assert (len(short.done), short.stopped) == (8, "budget")


def test_paired_intervals_see_a_small_difference_that_all_samples_share() -> None:
    draw = np.random.default_rng(0)
    hard = {task: draw.gamma(1.0, size=200) for task in ("x", "y")}
    one = {task: np.ones(200) for task in hard}
    left = Values(hard, one)
    right = Values({task: value - 0.01 for task, value in hard.items()}, one)
    draws = resample([left, right], 500, 0)
    assert draws.std(axis=0).min() > 0.03
    assert np.allclose(draws[:, 0] - draws[:, 1], 0.01)
    assert np.array_equal(resample([left, right], 500, 0), draws)
    kept = [Values.from_json(dict(reversed(one.to_json().items()))) for one in (left, right)]
    assert np.array_equal(resample(kept, 500, 0), draws)


def test_the_curve_meets_the_models_at_its_ends(world: Any, searched: Any, tmp_path: Path) -> None:
    data, exports = world
    wanted = CurveSettings(models=exports[:2], data=data, out=str(tmp_path), points=5, beyond=0.25, samples_per_task=6)
    result = json.loads(draw_curve(wanted, progress=False).read_text())
    assert [point["t"] for point in result["points"]] == [-0.25, 0, 0.25, 0.5, 0.75, 1, 1.25]
    metrics = {point["t"]: point["metric"] for point in result["points"]}
    rows = {row["name"]: row["metric"] for row in searched[1]["rows"]}
    assert (metrics[0.0], metrics[1.0]) == (pytest.approx(rows["a"]), pytest.approx(rows["b"]))
    rises = {t: metrics[t] - (1 - t) * metrics[0.0] - t * metrics[1.0] for t in (0.25, 0.5, 0.75)}
    assert result["barrier"]["height"] == pytest.approx(max(rises.values()))
    assert line_places(3, 0.0) == [0.0, 0.5, 1.0]
    page = write_merge_page(tmp_path / "merge.html", "T", curve=result, soup=searched[1]).read_text()
    assert "soup_weights" in page
    assert "straight line" in page


def test_models_that_answer_nothing_are_named_with_what_they_lack(world: Any, tmp_path: Path) -> None:
    data, exports = world
    bare, foreign = tmp_path / "bare", tmp_path / "foreign"
    for folder in (bare, foreign):
        shutil.copytree(exports[0], folder)
    (bare / "tokenizer.json").unlink()
    config = json.loads((bare / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    (bare / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key != "eos_token_id"})
    )
    with pytest.raises(SettingsError) as caught:
        draw_curve(CurveSettings(models=[str(bare), str(foreign)], data=data, out=str(tmp_path / "out")), False)
    assert f"{bare}: it has no tokenizer.json, its config.json has no eos_token_id" in str(caught.value)
    assert f"{foreign}: it is a model of the type llama, not Keye" in str(caught.value)


def test_files_are_hashed_again_when_they_change_and_only_then(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(fingerprints, "file_sha256", lambda file: (read.append(file.name), file_sha256(file))[1])
    folder = tmp_path / "a"
    shutil.copytree(world[1][0], folder)
    export = Export.open("a", str(folder))
    first = export.fingerprint(fingerprints.FileHashes(tmp_path))
    assert read == ["config.json", "tokenizer.json", "model.safetensors"]
    read.clear()
    assert export.fingerprint(fingerprints.FileHashes(tmp_path)) == first
    assert read == ["config.json", "tokenizer.json"]
    file = folder / "model.safetensors"
    content, before = bytearray(file.read_bytes()), file.stat()
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as an archive would unpack it
    assert export.fingerprint(fingerprints.FileHashes(tmp_path)) != first


def test_hashes_of_files_that_are_gone_are_forgotten(tmp_path: Path) -> None:
    """A cache that outlives thousands of checkpoints does not grow with them."""
    old, new = tmp_path / "old", tmp_path / "new"
    for file in (old, new):
        file.write_text(file.name)
    fingerprints.FileHashes(tmp_path)(old)
    old.unlink()
    assert fingerprints.FileHashes(tmp_path)(new) == file_sha256(new)
    assert list(read_json(tmp_path / fingerprints.FILES)) == [str(new.resolve())]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"budget": 5}, "need at least"),
        ({"methods": []}, "greedy, weights"),
        ({"selection_per_task": 0}, "selection_per_task"),
        ({"bootstrap_draws": 3}, "bootstrap_draws"),
        ({"methods": [SoupMethod.greedy, SoupMethod.greedy]}, "once each"),
        ({"max_minutes": 0.0}, "max_minutes"),
    ],
)
def test_settings_that_cannot_work_are_refused(world: Any, tmp_path: Path, values: Any, expected: str) -> None:
    with pytest.raises(SettingsError, match=expected):
        soup(world, tmp_path, **values).check()
