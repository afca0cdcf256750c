"""Every shipped recipe composes, and what cannot work stops with a message that names the key."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import reduce
from pathlib import Path

import pytest

import recipes
from keye_train import compose
from keye_train.cli import merge_main, pipeline_main, train_main
from keye_train.settings import (
    CurveSettings,
    DiagnosisSettings,
    EvaluationSettings,
    MergeMethod,
    MergeSettings,
    PipelineSettings,
    SettingsError,
    SoupSettings,
    TrainSettings,
)
from keye_train.settings.merge_methods import METHODS

EIGHT_B = ["model=keye_8b", "data=keye_example", "model.tokenizer=tokenizer", "model.start.random=true"]


@pytest.mark.parametrize("stage", compose.choices("stage"))
@pytest.mark.parametrize("model", compose.choices("model"))
@pytest.mark.parametrize("data", compose.choices("data"))
def test_stage_model_and_data_compose_in_every_combination(stage: str, model: str, data: str) -> None:
    settings = compose.load_settings(
        TrainSettings,
        "train",
        [f"stage={stage}", f"model={model}", f"data={data}", "model.tokenizer=tokenizer", "model.start.random=true"],
    )
    assert settings.stage.name == stage
    assert settings.run_dir == f"runs/{stage}-{model}-{data}"


@pytest.mark.parametrize("guards", compose.choices("guards"))
def test_guard_recipes_compose(guards: str) -> None:
    assert compose.load_settings(TrainSettings, "train", [*EIGHT_B, f"guards={guards}"]).guards.watchdog.enabled


@pytest.mark.parametrize("deepspeed", compose.choices("deepspeed"))
@pytest.mark.parametrize("logging", compose.choices("logging"))
def test_deepspeed_and_logging_recipes_compose(deepspeed: str, logging: str) -> None:
    settings = compose.load_settings(TrainSettings, "train", [*EIGHT_B, f"deepspeed={deepspeed}", f"logging={logging}"])
    assert settings.deepspeed.zero_stage in (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("name", "image", "frame", "video", "frames"),
    [("keye_v1", 16384, (128, 768), 24576, 768), ("keye_1_5", 20480, (48, 768), 75000, 1562)],
)
def test_resolution_recipes_hold_the_budgets_of_the_reports(
    name: str, image: int, frame: tuple[int, int], video: int, frames: int
) -> None:
    for data in compose.choices("data"):
        settings = compose.load_settings(TrainSettings, "train", [*EIGHT_B, f"data={data}", f"+resolution={name}"])
        resolution = settings.data.resolution
        assert (resolution.image_min_tokens, resolution.image_max_tokens) == (4, image)
        assert (resolution.video_frame_min_tokens, resolution.video_frame_max_tokens) == frame
        assert (resolution.video_max_tokens, resolution.video_max_frames) == (video, frames)
        assert (resolution.video_fps, resolution.video_min_frames) == (2.0, 4)
    assert set(compose.choices("resolution")) == {"keye_v1", "keye_1_5"}


def test_merge_recipes_compose() -> None:
    for name in compose.choices("merge"):
        about = METHODS[MergeMethod(name)]
        words = ["last=3", "models=[a]"] if "last" in about.needs else ["models=[a,b]"]
        words += ["weights=[1.0,3.0]"] * (about.weights != "none") + ["base=d"] * ("base" in about.needs)
        settings = compose.load_settings(MergeSettings, "merge", [f"merge={name}", "out=c", *words])
        assert settings.method.value == name
    assert compose.choices("merge") == sorted(method.value for method in METHODS)


def test_pipeline_recipes_compose_with_every_stage_they_name() -> None:
    from keye_train.pipeline import stage_settings

    for name in compose.choices("pipeline"):
        settings = compose.load_settings(PipelineSettings, "pipeline", [f"pipeline={name}"])
        for run in settings.runs():
            assert stage_settings(settings, run).run_dir == f"{settings.out}/{run.name}"


def test_recipes_about_averages_compose() -> None:
    models = ["models=[runs/a,runs/b]", "out=o"]
    assert compose.load_settings(DiagnosisSettings, "diagnose", [*models, "base=runs/p"]).base == "runs/p"
    assert compose.load_settings(CurveSettings, "curve", [*models, "data=demo", "points=5"]).points == 5
    assert compose.load_settings(SoupSettings, "search", [*models, "data=demo", "metric=score"]).budget == 40


def test_evaluation_recipe_composes() -> None:
    settings = compose.load_settings(
        EvaluationSettings, "eval", ["data=demo", "models=[runs/a,runs/b/export]", "out=o"]
    )
    assert settings.named_models() == {"a": "runs/a", "b": "runs/b/export"}


def test_a_stored_recipe_reads_back_equal() -> None:
    import yaml

    settings = compose.load_settings(TrainSettings, "train", EIGHT_B)
    assert compose.to_settings(TrainSettings, yaml.safe_load(compose.to_yaml(settings))) == settings


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stage.stps=3"], "Did you mean 'steps'"),
        (["stage=2_multitsk"], "there are: 0_vision, 1_align, 2_multitask, 3_anneal"),
        (["steps"], "KEY=VALUE"),
        (["data.sources.video.filter=duration > 5"], "needs quotes of its own"),
        (["model.tokenizer=???"], "model.tokenizer has no value: set model.tokenizer=..."),
        (["data.mixtures.align.caption=-1"], "data.mixtures.align.caption=-1: weights are numbers >= 0"),
        (["data.mixtures.align.video=1"], "to add it, write +data.mixtures.align.video=..."),
        (["data.mixtures.align=3"], "data.mixtures.align=3: give each source its weight"),
        (["+data.sources.new={shards:[a.tar]}"], "'+data.sources={new:{KEY:VALUE,...}}'"),
        (["stage.steps=many"], "stage.steps"),
        (["stage=9_moon"], "9_moon"),
        (["deepspeed=zero0", "deepspeed.precision=bf16"], "bf16_autocast"),
        (["deepspeed=zero2", "deepspeed.offload_parameters=true"], "zero_stage=3"),
        (["deepspeed=zero3", "deepspeed.nvme_path=/local"], "without deepspeed.offload_parameters=true"),
        (["stage.mixture=moon"], "mixtures: "),
        (["stage.trainable=[vision,text_tower]"], "text_tower"),
        (["stage=1_align", "stage.optimizer.module_lr.vision=1e-4"], "has no effect"),
        (["stage=1_align", "stage.schedule.decay_steps=10"], "shape=wsd only"),
        (["stage.schedule.warmup_steps=1000000000"], "exceed stage.steps"),
        (
            ["stage.steps=30", "stage.schedule.warmup_steps=10", "stage.schedule.decay_steps=50"],
            "at most stage.schedule.warmup_steps=5 stage.schedule.decay_steps=25",
        ),
        (["model.language.mrope_section=[1,2,3]"], "mrope_section"),
        (["data.resolution.image_min_tokens=0"], "image_min_tokens"),
        (["model.start.random=false"], "parent="),
        (["guards.spike.min_steps=200"], "guards.spike.window_steps=128"),
        (["guards.watchdog.step_s=9000"], "has no effect: collectives give up"),
        (["guards.watchdog.data_s=9000"], "data_s=9000 has no effect: collectives give up"),
        (["guards.non_finite.max_in_a_row=0"], "must be at least 1"),
        (["stage.compile_layers=true", "stage.activation_checkpointing=full"], "set one of"),
        (
            ["stage.compile_layers=true", "stage.activation_checkpointing=none", "deepspeed=zero3"],
            "deepspeed.zero_stage=2 or less",
        ),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(overrides: list[str], expected: str) -> None:
    with pytest.raises(SettingsError) as raised:
        compose.load_settings(TrainSettings, "train", [*EIGHT_B, *overrides])
    assert expected in str(raised.value)


def test_weights_may_be_whole_numbers_and_given_as_a_table(tmp_path: Path) -> None:
    shutil.copytree(Path(recipes.__file__).parent, tmp_path / "recipes")
    recipe = tmp_path / "recipes" / "data" / "keye_example.yaml"
    recipe.write_text(recipe.read_text().replace("align: {caption: 1.0}", "align: {caption: 1, text: 3}"))
    overrides = [*EIGHT_B, "data.mixtures.align.text=2", "data.mixtures.vision={pairs:2}"]
    overrides += ["+data.mixtures.mine={video:1}", "stage.mixture=mine", "+data.sources={new:{shards:[a.tar]}}"]
    data = compose.load_settings(TrainSettings, "train", overrides, str(tmp_path / "recipes")).data
    assert data.mixtures["align"] == {"caption": 1.0, "text": 2.0}
    assert data.mixtures["vision"] == {"pairs": 2.0}
    assert data.mixtures["mine"] == {"video": 1.0}
    assert all(isinstance(weight, float) for weights in data.mixtures.values() for weight in weights.values())
    assert data.sources["new"].shards == ["a.tar"]


def test_weights_of_modules_may_be_whole_numbers() -> None:
    words = ["models=[a,b]", "out=c", "+modules={mlp_AR.*:[1,0]}"]
    assert compose.load_settings(MergeSettings, "merge", words).modules == {"mlp_AR.*": [1.0, 0.0]}
    with pytest.raises(SettingsError, match=re.escape("modules: mlp_AR.*=1: give a list of weights")):
        compose.load_settings(MergeSettings, "merge", [*words[:2], "+modules={mlp_AR.*:1}"])


def test_a_number_out_of_its_range_is_refused_by_name() -> None:
    settings = compose.load_settings(TrainSettings, "train", EIGHT_B)
    for key, value in (
        ("stage.optimizer.lr", -1.0),
        ("stage.optimizer.module_lr.vision", float("nan")),
        ("stage.optimizer.weight_decay", -0.1),
        ("stage.optimizer.clip_norm", -1.0),
        ("stage.optimizer.eps", 0.0),
        ("stage.optimizer.betas", [0.9, 1.0]),
        ("stage.schedule.final_fraction", 2.0),
        ("stage.schedule.warmup_steps", -5),
        ("stage.trainable", ["vision", "vision"]),
        ("deepspeed.bucket_elements", 0),
        ("deepspeed.timeout_minutes", 0.0),
        ("deepspeed.param_persistence_threshold", -1),
        ("run_dir", ""),
        ("seed", -1),
    ):
        changed = deepcopy(settings)
        *parts, last = key.split(".")
        setattr(reduce(getattr, parts, changed), last, value)
        with pytest.raises(SettingsError, match=rf"^{re.escape(key)}\b"):
            changed.check()


def test_a_global_batch_that_does_not_divide_names_both_numbers() -> None:
    settings = compose.load_settings(TrainSettings, "train", [*EIGHT_B, "stage.global_batch_packs=8"])
    assert settings.gradient_accumulation(4) == 2
    with pytest.raises(SettingsError, match=r"global_batch_packs=8 does not divide over 3 ranks"):
        settings.gradient_accumulation(3)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["models=[a]", "out=o"], "at least two"),
        (["models=[a,b]"], "out has no value"),
        (["models=[a,b]", "out=o", "weights=[1,2]"], "no effect with method=uniform"),
        (["merge=weighted", "weights=[1]", "models=[a,b]", "out=o"], "one weight for each"),
        (["models=[a,b]", "out=o", "dtype=int8"], "dtype=int8"),
    ],
)
def test_a_merge_that_cannot_work_is_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(SettingsError) as raised:
        compose.load_settings(MergeSettings, "merge", overrides)
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    ("command", "words", "expected"),
    [
        (merge_main, ["verfy", "runs/merged"], "did you mean 'keye-merge verify'?"),
        (merge_main, ["serach", "data=demo"], "did you mean 'keye-merge search'?"),
        (train_main, ["plna", "model=tiny"], "did you mean 'keye-train plan'?"),
        (train_main, ["--show", "plan"], "did you mean 'keye-train plan'?"),
        (merge_main, ["runs/a", "runs/b"], "KEY=VALUE, as in"),
        (train_main, ["~plan"], "Could not delete"),
    ],
)
def test_a_mistyped_command_is_answered_with_the_right_one(
    command: Callable[[Sequence[str]], None],
    words: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        command(words)
    assert left.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(("command", "chosen"), [(train_main, "stage=2_multitask"), (pipeline_main, "pipeline=smoke")])
def test_a_command_without_any_choice_starts_nothing(
    command: Callable[[Sequence[str]], None],
    chosen: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It shows what there is to choose from instead; also on the ranks of a launcher, which adds a word of its own."""
    monkeypatch.chdir(tmp_path)
    group = chosen.partition("=")[0]
    for words in ([], ["--local_rank=0"]):
        with pytest.raises(SystemExit) as left:
            command(words)
        assert left.value.code == 2
        said = capsys.readouterr().err
        assert "Recipes to choose from" in said
        assert f"nothing is chosen: give {group}=..." in said
    for words in (["--show"], [chosen, "--show"]):
        with pytest.raises(SystemExit) as left:
            command(words)
        assert left.value.code == 0
    assert not list(tmp_path.iterdir())
