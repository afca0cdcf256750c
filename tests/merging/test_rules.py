"""Each method against a case worked by hand, its end points and its symmetries, through whole exports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from keye_train import compose
from keye_train.cli.chain import merge_help
from keye_train.merging import MergeError, merge
from keye_train.merging.geometry import slerp_coefficients
from keye_train.merging.rules import trajectory_weights
from keye_train.settings import MergeMethod, MergeSettings, SettingsError
from keye_train.settings.merge_methods import METHODS
from keye_train.settings.merging import ALLOWED_DIFFERENCES

Export = Callable[..., Path]


def tensors_of(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(6, 5, generator=draw).bfloat16() for name in ("visual.a", "mlp_AR.b", "model.c")}
    drawn["model.c"][0, 0] = -0.0
    return drawn


def run(folders: list[Path], out: Path, **values: object) -> dict[str, Tensor]:
    settings = MergeSettings(models=[str(f) for f in folders], out=str(out), **values)  # type: ignore[arg-type]
    return load_file(merge(settings, progress=False) / "model.safetensors")


def same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


SETTINGS: list[dict[str, object]] = [
    {"method": MergeMethod.wma},
    {"method": MergeMethod.ema, "decay": 0.7},
    {"method": MergeMethod.slerp, "weights": [1.0, 2.0]},
    {"method": MergeMethod.spherical, "weights": [1.0, 2.0]},
    {"method": MergeMethod.task_arithmetic, "weights": [0.3, -2.0], "base": "itself"},
    {"method": MergeMethod.ties, "weights": [1.0, 2.0], "base": "itself"},
    {"method": MergeMethod.dare_linear, "weights": [1.0, 2.0], "density": 0.5, "base": "itself"},
    {"method": MergeMethod.dare_ties, "weights": [1.0, 2.0], "density": 0.5, "base": "itself"},
    {"method": MergeMethod.model_stock, "base": "itself"},
    {"method": MergeMethod.model_stock, "base": "other"},
    {"method": MergeMethod.ties, "weights": [1.0, 1.0], "density": 1.0, "base": "other"},
    {"method": MergeMethod.uniform, "modules": {"visual.*": [1.0, 2.0]}},
]


@pytest.mark.parametrize("values", SETTINGS, ids=lambda v: v["method"].value)
def test_merge_with_itself_is_identity(export: Export, tmp_path: Path, values: dict[str, object]) -> None:
    folder = export("a", tensors_of(0))
    other = export("b", tensors_of(1))
    base = {"base": str({"itself": folder, "other": other}[str(values["base"])])} if "base" in values else {}
    merged = run([folder, folder], tmp_path / "out", **values | base)
    assert all(same(merged[name], tensor) for name, tensor in tensors_of(0).items())


def test_trajectory_weights() -> None:
    assert trajectory_weights(MergeMethod.wma, 3, None) == [1, 2, 3]
    weights = trajectory_weights(MergeMethod.ema, 3, 0.5)
    assert weights == [0.25, 0.25, 0.5]  # ((a / 2 + b / 2) / 2 + c / 2)
    assert sum(trajectory_weights(MergeMethod.ema, 9, 0.8)) == pytest.approx(1)


def test_slerp_end_points_symmetry_and_arc(export: Export, tmp_path: Path) -> None:
    a, b = export("a", tensors_of(0)), export("b", tensors_of(1))
    for weights, expected in (([1.0, 0.0], tensors_of(0)), ([0.0, 3.0], tensors_of(1))):
        merged = run([a, b], tmp_path / f"end{weights[0]}", method=MergeMethod.slerp, weights=weights)
        assert all(same(merged[name], expected[name]) for name in expected)
    left = run([a, b], tmp_path / "l", method=MergeMethod.slerp, weights=[1.0, 3.0])
    right = run([b, a], tmp_path / "r", method=MergeMethod.slerp, weights=[3.0, 1.0])
    assert all(same(left[name], right[name]) for name in left)
    # Half of a right angle: both factors are sin 45 / sin 90.
    assert slerp_coefficients(0.0, [1.0, 1.0]) == pytest.approx((0.5**0.5, 0.5**0.5))
    assert slerp_coefficients(1.0, [1.0, 3.0]) == (0.25, 0.75)


def test_task_arithmetic(export: Export, tmp_path: Path) -> None:
    values = {"base": [1.0, 2.0], "a": [2.0, 2.0], "b": [1.0, 6.0]}
    base, a, b = (export(name, {"model.c": torch.tensor(value)}) for name, value in values.items())
    kind = {"method": MergeMethod.task_arithmetic, "base": str(base)}
    merged = run([a, b], tmp_path / "x", weights=[2.0, -0.5], **kind)
    assert merged["model.c"].tolist() == [3.0, 0.0]  # [1 + 2 * 1, 2 - 0.5 * 4]
    assert same(merged["model.c"], run([b, a], tmp_path / "y", weights=[-0.5, 2.0], **kind)["model.c"])


def test_projector_of_one_model(export: Export, tmp_path: Path) -> None:
    a, b = export("a", tensors_of(0)), export("b", tensors_of(1))
    merged = run([a, b], tmp_path / "out", modules={"mlp_AR.*": [1.0, 0.0], "model.*": [0.0, 1.0]})
    uniform = run([a, b], tmp_path / "uniform")
    assert same(merged["mlp_AR.b"], tensors_of(0)["mlp_AR.b"])
    assert same(merged["model.c"], tensors_of(1)["model.c"])
    assert same(merged["visual.a"], uniform["visual.a"])
    with pytest.raises(SettingsError, match=r"mlp_ar\.\* matches no tensor"):
        run([a, b], tmp_path / "none", modules={"mlp_ar.*": [1.0, 0.0]})


@pytest.mark.parametrize(
    "values",
    [
        {"method": MergeMethod.ema},
        {"decay": 0.5},
        {"method": MergeMethod.task_arithmetic, "weights": [1.0, 1.0]},
        {"method": MergeMethod.slerp, "weights": [1.0, -1.0]},
        {"method": MergeMethod.wma, "modules": {"model.*": [1.0, 1.0]}},
        {"modules": {"model.*": [1.0]}},
    ],
)
def test_settings_without_effect_or_sense_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        MergeSettings(models=["a", "b"], out="c", **values).check()  # type: ignore[arg-type]


def test_a_broken_model_is_named_also_where_its_weight_is_zero(export: Export, tmp_path: Path) -> None:
    broken = tensors_of(1)
    broken["mlp_AR.b"][2, 3] = float("nan")
    folders = [export("a", tensors_of(0)), export("b", broken)]
    for kind in ({"method": MergeMethod.weighted}, {"method": MergeMethod.slerp}):
        with pytest.raises(MergeError, match=r"mlp_AR\.b"):
            run(folders, tmp_path / "out", weights=[1.0, 0.0], **kind)


def test_patterns_on_the_command_line() -> None:
    words = ["merge=weighted", "models=[a,b]", "out=c", "weights=[1,1]", "+modules={mlp_AR.*:[1.0,0.0]}"]
    assert compose.load_settings(MergeSettings, "merge", words).modules == {"mlp_AR.*": [1.0, 0.0]}


def test_every_method_stands_in_the_manual_and_the_help() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "merging.md").read_text(encoding="utf-8")
    shown = merge_help()
    assert set(METHODS) == set(MergeMethod)
    for method, about in METHODS.items():
        assert f"| `{method.value}` | {about.formula} | {about.source} | {about.when} |" in manual
        assert f"merge={method.value}\n      {about.formula}\n" in shown
    for kind, rule in ALLOWED_DIFFERENCES.items():
        assert f"| `{kind}` | {rule} |" in manual
