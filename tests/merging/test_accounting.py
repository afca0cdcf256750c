"""Every tensor is accounted for: what may differ says ``allow``, and what becomes of it is as documented."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from keye_train.merging import MergeError, merge
from keye_train.merging.sources import last_checkpoints
from keye_train.merging.verify import verify
from keye_train.settings import MergeMethod, MergeSettings, SettingsError
from keye_train.settings.merge_methods import METHODS

Export = Callable[..., Path]
ONE, TWO = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])


def run(folders: list[Path], out: Path, **values: object) -> tuple[dict[str, Tensor], dict[str, object]]:
    settings = MergeSettings(models=[str(f) for f in folders], out=str(out), **values)  # type: ignore[arg-type]
    merge(settings, progress=False)
    return load_file(out / "model.safetensors"), json.loads((out / "manifest.json").read_text())


CASES = {
    "missing": ({"w": ONE, "v": ONE}, {"w": TWO}, {"w": [2.0, 4.0], "v": [1.0, 2.0]}),
    "extra": ({"w": ONE}, {"w": TWO, "v": TWO}, {"w": [2.0, 4.0]}),
    "shape": ({"w": ONE}, {"w": torch.ones(3)}, {"w": [1.0, 2.0]}),
    "dtype": ({"w": ONE.bfloat16()}, {"w": TWO.half()}, {"w": [2.0, 4.0]}),
    "integers": ({"w": ONE, "n": torch.tensor([1])}, {"w": TWO, "n": torch.tensor([2])}, {"w": [2.0, 4.0], "n": [1]}),
}
INTEGERS = {
    "int32": (torch.tensor([1]), torch.tensor([2], dtype=torch.int32)),
    "equal values": (torch.tensor([1]), torch.tensor([1], dtype=torch.int32)),
    "float64": (torch.tensor([1.0]), torch.tensor([2.0], dtype=torch.float64)),
    "float64 first": (torch.tensor([1.0], dtype=torch.float64), torch.tensor([2.0])),
}


@pytest.mark.parametrize("case", INTEGERS)
def test_a_type_that_is_not_averaged_beside_another(export: Export, tmp_path: Path, case: str) -> None:
    left, right = INTEGERS[case]
    folders = [export("a", {"w": ONE, "n": left}), export("b", {"w": TWO, "n": right})]
    with pytest.raises(MergeError, match=r"n is .*\[allow=integers\]"):
        run(folders, tmp_path / "refused", allow=["dtype"])
    merged, manifest = run(folders, tmp_path / "out", allow=["integers"])
    assert (merged["n"].dtype, merged["n"].tolist()) == (left.dtype, left.tolist())
    assert len(manifest["allowed"]) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", CASES)
def test_a_difference_is_refused_and_its_rule_holds_where_it_is_allowed(
    export: Export, tmp_path: Path, kind: str
) -> None:
    left, right, expected = CASES[kind]
    folders = [export("a", left), export("b", right)]
    with pytest.raises(MergeError, match=rf"\[allow={kind}\]"):
        run(folders, tmp_path / "refused")
    merged, manifest = run(folders, tmp_path / "out", allow=[kind])
    assert {name: tensor.tolist() for name, tensor in merged.items()} == expected
    assert manifest["dropped"] == (["v"] if kind == "extra" else [])
    assert [text.split("[")[-1] for text in manifest["allowed"]] == [f"allow={kind}]"]  # type: ignore[attr-defined]
    if kind == "dtype":
        assert merged["w"].dtype == torch.promote_types(torch.bfloat16, torch.float16)


SETTINGS: dict[MergeMethod, dict[str, object]] = {
    MergeMethod.ema: {"decay": 0.5},
    MergeMethod.dare_linear: {"density": 0.5},
    MergeMethod.dare_ties: {"density": 0.5},
}


@pytest.mark.parametrize("method", MergeMethod)
def test_a_tensor_that_one_model_and_the_base_have(export: Export, tmp_path: Path, method: MergeMethod) -> None:
    """Where deltas are neither scaled nor drawn, it is that model's."""
    for number, tensors in enumerate([{"w": ONE, "v": TWO}, {"w": TWO}]):
        export(f"step-{number}", tensors)
    needs = METHODS[method].needs
    values = dict(SETTINGS.get(method, {}), method=method, allow=["missing"])
    if METHODS[method].weights != "none":
        values["weights"] = [1.0, 1.0]
    if "base" in needs:
        values["base"] = str(export("base", {"w": torch.zeros(2), "v": torch.zeros(2)}))
    if method == MergeMethod.ties:
        values["density"] = 1.0
    models = [tmp_path / "step-0", tmp_path / "step-1"]
    if "last" in needs:
        (tmp_path / "run").mkdir()
        models = [model.rename(tmp_path / "run" / model.name) for model in models]
        models, values["last"] = [tmp_path / "run"], 2
    merged, manifest = run(models, tmp_path / "out", **values)
    if "dare" in method.value:
        assert all(value in (0.0, 2 * whole) for value, whole in zip(merged["v"].tolist(), TWO.tolist(), strict=True))
    else:
        assert merged["v"].tolist() == TWO.tolist()
    if "base" in needs:
        assert manifest["weights"][-1] == (-1.0 if method == MergeMethod.task_arithmetic else None)  # type: ignore[index]


def test_a_tensor_that_the_base_lacks_is_the_first_models(export: Export, tmp_path: Path) -> None:
    a, b, base = export("a", {"w": ONE, "v": ONE}), export("b", {"w": TWO, "v": TWO}), export("base", {"w": ONE})
    kind = {"method": MergeMethod.task_arithmetic, "weights": [1.0, 1.0], "base": str(base)}
    merged, _ = run([a, b], tmp_path / "out", allow=["missing"], **kind)
    assert merged["v"].tolist() == [1.0, 2.0]
    assert merged["w"].tolist() == [3.0, 6.0]


def test_configuration_and_tokenizer(export: Export, tmp_path: Path) -> None:
    other = {"rope_theta": 5e5, "hidden_act": "gelu"}
    folders = [export("a", {"w": ONE}), export("b", {"w": TWO}, config=other, tokenizer={"model": {"vocab": {}}})]
    with pytest.raises(MergeError) as caught:
        run(folders, tmp_path / "refused", allow=["tokenizer"])
    assert [problem.split("[")[-1] for problem in caught.value.problems] == ["allow=config]", "allow=rope]"]
    run(folders, tmp_path / "out", allow=["config", "rope", "tokenizer"])
    for name in ("config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((folders[0] / name).read_text())


def test_tied_beside_untied(export: Export, tmp_path: Path) -> None:
    tied = export("a", {"model.embed_tokens.weight": ONE}, config={"tie_word_embeddings": True})
    untied = export(
        "b", {"model.embed_tokens.weight": TWO, "lm_head.weight": ONE}, config={"tie_word_embeddings": False}
    )
    with pytest.raises(MergeError, match=r"\[allow=extra\]"):
        run([tied, untied], tmp_path / "refused")
    merged, _ = run([tied, untied], tmp_path / "out", allow=["tied"])
    assert merged["model.embed_tokens.weight"].tolist() == [2.0, 4.0]
    assert merged["lm_head.weight"].tolist() == [1.0, 2.0]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_tie_that_no_config_names(export: Export, tmp_path: Path) -> None:
    both = {"model.embed_tokens.weight": ONE, "lm_head.weight": ONE}
    twice = [export("a", both), export("b", both)]
    merged, _ = run(twice, tmp_path / "out")  # two tensors, and equal as before
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    once = export("c", {"model.embed_tokens.weight": ONE})
    for folders in ([twice[0], once], [once, twice[0]]):
        with pytest.raises(MergeError, match=r"c: has no tensor lm_head.*tie_word_embeddings: true\) and allow tied"):
            run(folders, tmp_path / "refused")


EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
TIED = {"tie_word_embeddings": True}


def test_a_tied_matrix_that_is_stored_twice_is_written_once(export: Export, tmp_path: Path) -> None:
    """Whichever of the models store it twice."""
    folders = [
        export("a", {EMBEDDING: ONE, OUTPUT: ONE}, shards=2, config=TIED),
        export("b", {EMBEDDING: TWO}, config=TIED),
    ]
    for models in (folders, folders[::-1]):
        out = tmp_path / models[0].name / "out"
        merged, manifest = run(models, out)
        assert {name: tensor.tolist() for name, tensor in merged.items()} == {EMBEDDING: [2.0, 4.0]}
        assert manifest["dropped"] == [OUTPUT]
        assert '"tie_word_embeddings": true' in (out / "config.json").read_text()
        verdict = verify(out)
        assert (verdict.faults, verdict.unchecked) == ([], [])
        files = next(parent for parent in manifest["parents"] if parent["path"] == str(folders[0]))["files"]  # type: ignore[attr-defined]
        assert len([name for name in files if name.endswith(".safetensors")]) == 2  # both decided the result


def test_a_tied_matrix_that_is_stored_twice_and_differs(export: Export, tmp_path: Path) -> None:
    values = {"a": ONE, "b": TWO}
    twice = [export(name, {EMBEDDING: value, OUTPUT: value + 1}, config=TIED) for name, value in values.items()]
    with pytest.raises(MergeError) as caught:
        run(twice, tmp_path / "refused")
    assert len(caught.value.problems) == 2
    for folder, problem in zip(twice, caught.value.problems, strict=True):
        assert f"{folder / 'model.safetensors'}: {OUTPUT} differs from {EMBEDDING}" in problem
        assert problem.endswith("[allow=tied]")
    once = export("c", {EMBEDDING: ONE}, config=TIED)
    merged, manifest = run([*twice, once], tmp_path / "out", allow=["tied"])
    assert {name: tensor.tolist() for name, tensor in merged.items()} == {
        EMBEDDING: pytest.approx([5 / 3, 10 / 3]), OUTPUT: pytest.approx([7 / 3, 4.0])
    }  # fmt: skip
    assert (manifest["dropped"], len(manifest["allowed"])) == ([], 3)  # type: ignore[arg-type]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    other_type = export("d", {EMBEDDING: ONE, OUTPUT: ONE.bfloat16()}, config=TIED)
    with pytest.raises(MergeError, match=rf"d/model.safetensors: {OUTPUT} differs"):
        run([once, other_type], tmp_path / "refused")


def test_nothing_allows_values_that_are_not_finite(export: Export, tmp_path: Path) -> None:
    folders = [export("a", {"w": ONE}), export("b", {"w": torch.tensor([1.0, float("inf")])})]
    with pytest.raises(SettingsError, match="allow=nonfinite: choose among missing, extra"):
        run(folders, tmp_path / "out", allow=["nonfinite"])
    base = {"weights": [1.0, 1.0], "base": str(folders[0])}
    for values in ({"method": MergeMethod.ties}, {"method": MergeMethod.dare_linear, "density": 0.5}):
        with pytest.raises(MergeError, match="w holds NaN or infinity"):
            run(folders, tmp_path / "out", **values | base)
    with pytest.raises(MergeError, match="w holds NaN or infinity"):
        run(folders, tmp_path / "out", method=MergeMethod.spherical, weights=[1.0, 1.0])


def test_opposite_directions_have_no_mean_on_the_sphere(export: Export, tmp_path: Path) -> None:
    folders = [export("a", {"w": ONE}), export("b", {"w": -ONE}), export("c", {"w": -ONE})]
    with pytest.raises(MergeError, match="w: the mean on the sphere was not found"):
        run(folders, tmp_path / "out", method=MergeMethod.spherical, weights=[1.0, 1.0, 1.0])


def test_pickles_are_refused_unread(export: Export, tmp_path: Path) -> None:
    good = export("a", {"w": ONE})
    zero = tmp_path / "zero"
    (zero / "global_step4").mkdir(parents=True)
    (zero / "global_step4" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"never read")
    with pytest.raises(SettingsError, match=r"is a pickle.*zero_to_fp32\.py"):
        run([good, zero], tmp_path / "out")
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "config.json").write_text("{}")
    (hub / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(SettingsError, match=r"pytorch_model\.bin, a pickle"):
        run([good, hub], tmp_path / "out")


def test_the_last_of_a_folder_of_numbered_models(export: Export, tmp_path: Path) -> None:
    for step, value in ((100, 8.0), (90, 2.0), (1000, 4.0)):
        export(f"checkpoint-{step}", {"w": torch.tensor([value])}).rename(tmp_path / f"trained-{step}")
    runs = tmp_path / "runs"
    runs.mkdir()
    for path in tmp_path.glob("trained-*"):
        path.rename(runs / path.name)
    assert [Path(path).name for path in last_checkpoints(runs, 2)] == ["trained-100", "trained-1000"]
    merged, manifest = run([runs], tmp_path / "out", method=MergeMethod.lawa, last=2)
    assert merged["w"].tolist() == [6.0]
    assert manifest["weights"] == [0.5, 0.5]
    with pytest.raises(SettingsError, match="holds 3 checkpoint"):
        run([runs], tmp_path / "more", method=MergeMethod.lawa, last=4)
