"""The diagnosis tells what NumPy tells on whole tensors, in bounded memory, and names what it cannot compare."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from keye_train.merging import MergeError, merge
from keye_train.merging import windows as windows_module
from keye_train.merging.diagnosis import diagnose, is_diagnosed, module_of
from keye_train.model.parameters import PACKING_TABLE, POOLING_HEAD
from keye_train.report.merge_page import write_merge_page
from keye_train.settings import DiagnosisSettings, MergeSettings, SettingsError

NAMES = {
    "visual.vision_model.encoder.layers.0.w": (30, 41),
    "mlp_AR.linear_1.weight": (7, 9),
    "model.layers.0.w": (50,),
    "model.layers.1.w": (8, 8),
    "lm_head.weight": (5, 6),
}


def siblings(seed: int, step: float) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A parent and three models that share half of their movement."""
    draw = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=draw) for name, shape in NAMES.items()}
    shared = {name: torch.randn(shape, generator=draw) for name, shape in NAMES.items()}
    models = [
        {name: base[name] + step * (shared[name] + torch.randn(shape, generator=draw)) for name, shape in NAMES.items()}
        for _ in range(3)
    ]
    return base, models


def run(folder: Path, models: list[Path], base: Path | None = None) -> dict[str, Any]:
    settings = DiagnosisSettings(
        models=[str(model) for model in models], base=base and str(base), out=str(folder / "out")
    )
    return json.loads(diagnose(settings, progress=False).read_text())


@pytest.fixture
def found(tmp_path: Path, export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(windows_module, "MOST_ELEMENTS", 1 << 10)  # so that tensors of the toy span several windows
    base, models = siblings(0, 0.05)
    folders = [export(f"m{i}", model, shards=1 + i) for i, model in enumerate(models)]
    return base, models, run(tmp_path, folders, export("parent", base)), folders


def test_figures_are_those_of_whole_tensors_in_float64(found: Any) -> None:
    base, models, result, _ = found
    groups = {"all": list(NAMES), "language": ["model.layers.0.w", "model.layers.1.w", "lm_head.weight"]}
    for group, names in groups.items():
        flat = np.stack([np.concatenate([m[n].double().numpy().ravel() for n in names]) for m in models])
        origin = np.concatenate([base[n].double().numpy().ravel() for n in names])
        deltas = flat - origin
        figures = result["modules"][group]
        assert figures["elements"] == len(origin)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            scale = math.sqrt(np.linalg.norm(flat[i]) * np.linalg.norm(flat[j]))
            assert figures["distance"][i][j] == pytest.approx(np.linalg.norm(flat[i] - flat[j]) / scale, rel=1e-5)
            lengths = np.linalg.norm(deltas[i]) * np.linalg.norm(deltas[j])
            assert figures["cosine"][i][j] == pytest.approx(deltas[i] @ deltas[j] / lengths, rel=1e-5)
            both = (deltas[i] != 0) & (deltas[j] != 0)
            opposed = ((deltas[i] * deltas[j] < 0) & both).sum() / both.sum()
            assert figures["conflict"][i][j] == pytest.approx(opposed, rel=1e-5)
        change = np.linalg.norm(deltas, axis=1) / np.linalg.norm(origin)
        assert figures["change"] == pytest.approx(change, rel=1e-5)
        plus, minus = np.clip(deltas, 0, None).sum(0), np.clip(-deltas, 0, None).sum(0)
        assert figures["minority"] == pytest.approx(np.minimum(plus, minus).sum() / (plus + minus).sum())
        kept = np.linalg.norm(deltas.mean(0)) / np.linalg.norm(deltas, axis=1).mean()
        assert figures["kept"] == pytest.approx(kept)


def test_siblings_are_told_from_strangers(tmp_path: Path, export: Callable[..., Path], found: Any) -> None:
    _, models, result, folders = found
    assert result["verdict"]["verdict"] == "one basin"
    stranger = export("stranger", siblings(1, 0.0)[0])
    apart = run(tmp_path / "apart", [folders[0], stranger])
    assert apart["verdict"]["verdict"] == "apart"
    assert "cosine" not in apart["modules"]["all"]  # no parent, no deltas
    against = export("against", {name: 2 * found[0][name] - models[0][name] for name in NAMES})
    opposed = run(tmp_path / "opposed", [folders[0], against], tmp_path / "parent")
    assert opposed["verdict"]["verdict"] == "apart"
    assert opposed["modules"]["all"]["cosine"][0][1] == pytest.approx(-1, abs=1e-5)


def test_a_diagnosis_of_the_same_models_is_kept_and_of_changed_ones_made_anew(
    tmp_path: Path, export: Callable[..., Path], found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, models, result, folders = found
    read: list[str] = []
    windows = windows_module.Windows.read
    monkeypatch.setattr(windows_module.Windows, "read", lambda self, name: (read.append(name), windows(self, name))[1])
    wanted = DiagnosisSettings(
        models=[str(folder) for folder in folders], base=str(tmp_path / "parent"), out=str(tmp_path / "out")
    )
    assert is_diagnosed(wanted)
    assert run(tmp_path, folders, tmp_path / "parent") == result
    assert not read
    assert not is_diagnosed(replace(wanted, base=None))
    moved = models[2] | {"model.layers.0.w": 2 * models[2]["model.layers.0.w"]}
    shutil.rmtree(folders[2])
    export("m2", moved, shards=3)
    assert not is_diagnosed(wanted)
    again = run(tmp_path, folders, tmp_path / "parent")
    assert len(read) == len(NAMES)
    assert again["tensors"]["model.layers.0.w"] != result["tensors"]["model.layers.0.w"]
    assert is_diagnosed(wanted)


def test_layers_and_modules_are_named(found: Any) -> None:
    result = found[2]
    assert set(result["modules"]) == {"vision", "projector", "language", "all"}
    assert {"vision 0", "language 0", "language 1", "language, outside its layers"} <= set(result["layers"])
    assert module_of("something.weight") == "other"


def test_the_page_shows_verdict_bounds_and_models(found: Any, tmp_path: Path) -> None:
    page = write_merge_page(tmp_path / "merge.html", "Diagnosis <b>", diagnosis=found[2]).read_text()
    page_modules = page[page.index("By module") :]
    places = [page_modules.index(f">{name}<") for name in ("vision", "projector", "language", "all")]
    assert places == sorted(places)
    for text in ("One basin", "bounds (ours)", "m0", "m2", "parent", "Diagnosis &lt;b&gt;"):
        assert text in page
    assert "https://" not in page


def test_what_is_not_compared_is_told_with_what_a_merge_does_to_it(tmp_path: Path, export: Callable[..., Path]) -> None:
    probe = POOLING_HEAD + "probe"
    _, models = siblings(3, 0.1)
    unread = [{PACKING_TABLE: torch.full((4, 2), value), probe: torch.full((2,), -value)} for value in (1.0, 2.0)]
    count = {"steps": torch.tensor([7])}
    folders = [
        export(f"m{i}", model | more | count) for i, (model, more) in enumerate(zip(models, unread, strict=False))
    ]
    result = run(tmp_path, folders)
    assert (result["unread"], result["left_out"]) == ([PACKING_TABLE, probe], ["steps"])
    assert not {PACKING_TABLE, probe, "steps"} & set(result["tensors"])
    settings = MergeSettings(models=[str(folder) for folder in folders], out=str(tmp_path / "merged"))
    merged = load_file(merge(settings, progress=False) / "model.safetensors")
    assert torch.equal(merged[PACKING_TABLE], torch.full((4, 2), 1.5))
    assert torch.equal(merged[probe], torch.full((2,), -1.5))
    assert torch.equal(merged["steps"], count["steps"])
    page = " ".join(write_merge_page(tmp_path / "merge.html", "T", diagnosis=result).read_text().split())
    assert f"a merge averages them like all others: {PACKING_TABLE}, {probe}." in page
    assert "it is tied to): steps." in page


def test_what_cannot_be_compared_is_named(tmp_path: Path, export: Callable[..., Path]) -> None:
    base, models = siblings(1, 0.1)
    one = export("one", models[0])
    other = export("other", {name: value for name, value in models[1].items() if name != "lm_head.weight"})
    with pytest.raises(MergeError, match=r"lm_head\.weight is in .*one only"):
        run(tmp_path, [one, other])
    broken = models[1] | {"model.layers.0.w": torch.full((50,), torch.nan)}
    with pytest.raises(MergeError, match=r"broken: model\.layers\.0\.w holds NaN"):
        run(tmp_path, [one, export("broken", broken)], export("parent", base))
    with pytest.raises(SettingsError, match="at least two"):
        run(tmp_path, [one])


def test_a_model_equal_to_its_parent_has_no_direction(tmp_path: Path, export: Callable[..., Path]) -> None:
    base, models = siblings(2, 0.1)
    result = run(tmp_path, [export("same", base), export("moved", models[0])], export("parent", base))
    figures = result["modules"]["all"]
    assert figures["cosine"][0][1] is None
    assert figures["change"][0] == 0


def test_memory_does_not_grow_with_models_or_tensors(tmp_path: Path, export: Callable[..., Path]) -> None:
    big = {"model.layers.0.w": torch.zeros(24, 1 << 20, dtype=torch.bfloat16)}  # 48 MiB, 192 MiB as float64
    folders = [export(f"big{i}", big) for i in range(4)]
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from keye_train.merging.diagnosis import diagnose\n"
        "from keye_train.settings import DiagnosisSettings\n"
        "def kib(name): return int(re.search(name + r':\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = kib('VmRSS')\n"  # that of getrusage would begin with the memory of the tests, its parent
        "diagnose(DiagnosisSettings(models=sys.argv[2:], out=sys.argv[1]), progress=False)\n"
        "print(kib('VmHWM') - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out"), *map(str, folders)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 400 * 1024  # KiB; whole: 768 MiB
