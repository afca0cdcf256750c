"""A merge equals its reference, is whole or absent, and names all that keeps models from being merged."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from keye_train.merging import MergeError, deltas, geometry, merge, methods, streaming
from keye_train.merging.places import tensor_places
from keye_train.merging.verify import verify
from keye_train.runs import file_sha256
from keye_train.settings import MergeMethod, MergeSettings, SettingsError

Export = Callable[..., Path]


def tensors_of(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Several shapes, among them a scalar, an empty tensor and an integer buffer."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"visual.a.weight": (5, 7), "mlp_AR.b": (11,), "model.c": (2, 3, 4), "scale": (), "none": (0, 3)}
    tensors = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    return tensors | {"position_ids": torch.arange(6)}


def run(folders: list[Path], out: Path, **values: object) -> Path:
    return merge(MergeSettings(models=[str(f) for f in folders], out=str(out), **values), progress=False)  # type: ignore[arg-type]


def loaded(folder: Path) -> dict[str, Tensor]:
    """All tensors, read by the safetensors library and not by our reader."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


class TestResult:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_equals_a_float64_reference(self, export: Export, tmp_path: Path, dtype: torch.dtype) -> None:
        parts = [tensors_of(seed, dtype) for seed in range(3)]
        folders = [export(f"m{i}", part, shards=i + 1) for i, part in enumerate(parts)]
        merged = loaded(run(folders, tmp_path / "out"))
        assert merged.keys() == parts[0].keys()
        for name in parts[0].keys() - {"position_ids"}:
            mean = sum(part[name].double() for part in parts) / 3
            assert merged[name].dtype == dtype
            assert torch.equal(merged[name], mean.to(dtype)), name
        assert torch.equal(merged["position_ids"], torch.arange(6))

    def test_weights(self, export: Export, tmp_path: Path) -> None:
        a, b = tensors_of(0), tensors_of(1)
        folders = [export("a", a), export("b", b)]
        merged = loaded(run(folders, tmp_path / "out", method=MergeMethod.weighted, weights=[3.0, 1.0]))
        assert torch.equal(merged["model.c"], ((a["model.c"].double() * 3 + b["model.c"].double()) / 4).float())

    def test_order_of_models_and_their_sharding_do_not_matter(self, export: Export, tmp_path: Path) -> None:
        folders = [export(f"m{i}", tensors_of(i), shards=i + 1) for i in range(3)]
        first, second = run(folders, tmp_path / "x"), run(folders[::-1], tmp_path / "y")
        left, right = loaded(first), loaded(second)
        assert all(torch.equal(left[name], right[name]) for name in left)

    def test_with_itself_is_identity(self, export: Export, tmp_path: Path) -> None:
        folder = export("a", tensors_of(0, torch.bfloat16))
        twin = export("b", tensors_of(0, torch.bfloat16))
        merged, original = loaded(run([folder, twin, folder], tmp_path / "out")), loaded(folder)
        assert all(torch.equal(merged[name].view(-1), original[name].view(-1)) for name in original)

    def test_tensors_larger_than_a_piece(self, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folders = [export(f"m{i}", tensors_of(i)) for i in range(2)]
        whole = loaded(run(folders, tmp_path / "whole"))
        for module in (streaming, deltas, geometry):
            monkeypatch.setattr(module, "BLOCK", 8)
        monkeypatch.setattr(methods, "STRIDE", 16)
        monkeypatch.setattr(streaming, "PIECE_ELEMENTS", 24)
        pieces = loaded(run(folders, tmp_path / "pieces"))
        assert all(torch.equal(whole[name], pieces[name]) for name in whole)

    def test_shards_stay_below_the_limit_and_the_index_names_them(self, export: Export, tmp_path: Path) -> None:
        folders = [export(f"m{i}", tensors_of(i)) for i in range(2)]
        out = run(folders, tmp_path / "out", max_shard_bytes=150)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        places = tensor_places(out)
        assert index["weight_map"] == {name: place.file.name for name, place in places.items()}
        assert index["metadata"]["total_size"] == sum(place.n_bytes for place in places.values())
        assert len(set(index["weight_map"].values())) > 1
        for file in set(index["weight_map"].values()):
            inside = [p for p in places.values() if p.file.name == file]
            assert sum(p.n_bytes for p in inside) <= 150 or len(inside) == 1
        assert loaded(out).keys() == loaded(folders[0]).keys()

    def test_dtype_of_the_output_stands_in_the_config(self, export: Export, tmp_path: Path) -> None:
        folders = [export(f"m{i}", tensors_of(i)) for i in range(2)]
        out = run(folders, tmp_path / "out", dtype="bfloat16")
        assert loaded(out)["model.c"].dtype == torch.bfloat16
        assert loaded(out)["position_ids"].dtype == torch.int64
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"

    def test_manifest_names_parents_and_hashes(self, export: Export, tmp_path: Path) -> None:
        folders = [export(f"m{i}", tensors_of(i)) for i in range(2)]
        out = run(folders, tmp_path / "out", method=MergeMethod.weighted, weights=[1.0, 3.0])
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["weights"] == [0.25, 0.75]
        assert manifest["files"]["model.safetensors"]["sha256"] == file_sha256(out / "model.safetensors")
        for folder, parent in zip(folders, manifest["parents"], strict=True):
            assert parent["path"] == str(folder)
            assert parent["manifest_sha256"] == file_sha256(folder / "manifest.json")
            assert parent["files"]["model.safetensors"]["sha256"] == file_sha256(folder / "model.safetensors")
        assert (out / "tokenizer.json").read_text() == (folders[0] / "tokenizer.json").read_text()


class TestRefusal:
    def test_one_error_lists_every_difference(self, export: Export, tmp_path: Path) -> None:
        a, b, c = tensors_of(0), tensors_of(1), tensors_of(2)
        b["mlp_AR.b"] = b["mlp_AR.b"][:5].clone()
        b["model.c"] = b["model.c"].bfloat16()
        b["visual.a.weight"][0, 0] = float("nan")
        del c["scale"]
        c["logit_scale"] = torch.ones(1)
        c["position_ids"] = torch.arange(6) + 1
        folders = [
            export("a", a),
            export("b", b, config={"rope_theta": 1e6, "vision_config": {"hidden_size": 8}}),
            export("c", c, tokenizer={"model": {"vocab": {"b": 0}}}, config={"transformers_version": "0"}),
        ]
        with pytest.raises(MergeError) as caught:
            run(folders, tmp_path / "out")
        expected = [
            ("b/model.safetensors", "mlp_AR.b has shape [5]", "[11]"),
            ("b/model.safetensors", "model.c is bfloat16", "float32"),
            ("b/model.safetensors", "visual.a.weight holds NaN or infinity", ""),
            ("b/config.json", "rope_theta is 1000000.0", "10000.0"),
            ("b/config.json", "vision_config.hidden_size is 8", "4"),
            ("c", "has no tensor scale", "a/model.safetensors"),
            ("a", "has no tensor logit_scale", "c/model.safetensors"),
            ("c/tokenizer.json", "differs from", "a/tokenizer.json"),
            ("c/model.safetensors", "position_ids (int64) is not averaged and must equal", ""),
        ]
        for parts in expected:
            assert any(all(part in problem for part in parts) for problem in caught.value.problems), parts
        assert len(caught.value.problems) == len(expected), caught.value
        assert not (tmp_path / "out").exists()
        assert leftovers(tmp_path) == []

    def test_budgets_must_agree_and_who_wrote_them_does_not_matter(self, export: Export, tmp_path: Path) -> None:
        """The average would otherwise read pictures with the first model's budgets, silently."""
        folders = [export(name, tensors_of(number)) for number, name in enumerate("ab")]
        for folder, writer in zip(folders, ("image_processor_type", "auto_map"), strict=True):
            (folder / "preprocessor_config.json").write_text(json.dumps({"max_pixels": 784, writer: "x"}))
            (folder / "processor_config.json").write_text(json.dumps({"video": {"fps": 2.0}}))
        out = run(folders, tmp_path / "same")
        assert json.loads((out / "processor_config.json").read_text()) == {"video": {"fps": 2.0}}
        (folders[1] / "processor_config.json").write_text(json.dumps({"video": {"fps": 1.0}}))
        (folders[0] / "preprocessor_config.json").unlink()
        with pytest.raises(MergeError) as caught:
            run(folders, tmp_path / "other")
        missing, differs = caught.value.problems
        assert "a/preprocessor_config.json: is missing" in missing
        assert "b/processor_config.json: video.fps is 1.0, in" in differs
        assert "copy the processor_config.json that the merge shall have" in differs

    def test_all_values_that_are_not_finite_are_listed(self, export: Export, tmp_path: Path) -> None:
        a, b = tensors_of(0), tensors_of(1)
        a["model.c"][0, 0, 0] = float("inf")
        b["mlp_AR.b"][3] = float("nan")
        with pytest.raises(MergeError) as caught:
            run([export("a", a), export("b", b)], tmp_path / "out")
        assert len(caught.value.problems) == 2
        assert leftovers(tmp_path) == []

    def test_mean_that_does_not_fit_the_dtype(self, export: Export, tmp_path: Path) -> None:
        large, fits = {"w": torch.tensor([1e6])}, {f"x{number}": torch.ones(1) for number in range(30)}
        folders = [export(name, large | fits) for name in "ab"]  # work on the others has begun by then
        with pytest.raises(MergeError, match=r"- w: its average does not fit torch.float16: choose"):
            run(folders, tmp_path / "out", dtype="float16")

    def test_file_cut_off(self, export: Export, tmp_path: Path) -> None:
        folders = [export(f"m{i}", tensors_of(i)) for i in range(2)]
        file = folders[1] / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-4])
        with pytest.raises(ValueError, match=r"m1/model.safetensors is not a whole safetensors file"):
            run(folders, tmp_path / "out")

    def test_shard_missing(self, export: Export, tmp_path: Path) -> None:
        folders = [export(f"m{i}", tensors_of(i), shards=2) for i in range(2)]
        (folders[0] / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
            run(folders, tmp_path / "out")


class TestOutput:
    def test_same_merge_again_is_kept(self, export: Export, tmp_path: Path) -> None:
        folders = [export(f"m{i}", tensors_of(i)) for i in range(2)]
        out = run(folders, tmp_path / "out")
        before = (out / "model.safetensors").stat()
        os.utime(folders[0] / "model.safetensors")  # a new time stamp alone is no new model
        run(folders, tmp_path / "out")
        now = (out / "model.safetensors").stat()
        assert (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    def test_another_merge_is_refused(self, export: Export, tmp_path: Path) -> None:
        folders = [export(f"m{i}", tensors_of(i)) for i in range(2)]
        run(folders, tmp_path / "out")
        with pytest.raises(SettingsError, match=r"out=.* holds something else"):
            run(folders, tmp_path / "out", dtype="bfloat16")

    def test_changed_input_is_noticed(self, export: Export, tmp_path: Path) -> None:
        folders = [export(f"m{i}", tensors_of(i)) for i in range(2)]
        run(folders, tmp_path / "out")
        file = folders[1] / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")
        with pytest.raises(SettingsError, match="changed: remove"):
            run(folders, tmp_path / "out")

    @pytest.mark.parametrize("model", [0, 1])
    @pytest.mark.parametrize("change", ["changed", "added", "removed"])
    def test_changed_companion_is_noticed(self, export: Export, tmp_path: Path, model: int, change: str) -> None:
        folders = [export(f"m{i}", tensors_of(i)) for i in range(2)]
        for folder in folders:
            (folder / "vocab.json").write_text("{}")
        run(folders, tmp_path / "out")
        (folders[1] / "README.md").write_text("neither copied nor compared")
        run(folders, tmp_path / "out")
        if change == "changed":
            (folders[model] / "vocab.json").write_text('{"a": 1}')
            assert any("vocab.json" in fault for fault in verify(tmp_path / "out").faults)
        elif change == "added":
            (folders[model] / "chat_template.jinja").write_text("new")
        else:
            (folders[model] / "vocab.json").unlink()
        with pytest.raises(
            SettingsError, match=rf"merged before (vocab\.json|chat_template\.jinja) of .*m{model} changed"
        ):
            run(folders, tmp_path / "out")

    def test_foreign_folder_is_left_alone(self, export: Export, tmp_path: Path) -> None:
        folders = [export(f"m{i}", tensors_of(i)) for i in range(2)]
        (tmp_path / "out").mkdir()
        with pytest.raises(SettingsError, match="no merge of ours"):
            run(folders, tmp_path / "out")

    def test_remains_of_a_killed_merge_are_replaced(self, export: Export, tmp_path: Path) -> None:
        folders = [export(f"m{i}", tensors_of(i)) for i in range(2)]
        partial = tmp_path / ".out.partial"
        partial.mkdir()
        (partial / "model-00001-of-00009.safetensors").write_bytes(b"half")
        out = run(folders, tmp_path / "out")
        assert sorted(p.name for p in out.glob("*.safetensors")) == ["model.safetensors"]
        assert leftovers(tmp_path) == []

    def test_running_merge_is_not_disturbed(self, export: Export, tmp_path: Path) -> None:
        folders = [export(f"m{i}", tensors_of(i)) for i in range(2)]
        partial = tmp_path / ".out.partial"
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(b"growing")
        lock = os.open(partial, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            with pytest.raises(SettingsError, match="being written by another merge"):
                run(folders, tmp_path / "out")
        finally:
            os.close(lock)
        assert (partial / "model.safetensors").read_bytes() == b"growing"


class TestMemory:
    @pytest.mark.parametrize("has_base", [False, True])
    @pytest.mark.parametrize("models", [2, 5, 20, 70])
    @pytest.mark.parametrize("threads", [1, 4, 64, 512])
    def test_threads_fit_in_the_budget(self, threads: int, models: int, has_base: bool) -> None:
        workers = streaming.Workers(threads, models, has_base)
        blocks = workers.piece_elements // streaming.BLOCK
        assert workers.threads * streaming.thread_bytes(models, has_base, 4, blocks) <= streaming.BUDGET_BYTES
        assert 1 <= workers.threads <= threads

    def test_the_budget_holds_in_a_process(self, export: Export, tmp_path: Path) -> None:
        """Sixteen threads asked for, eight models whose sums are not exact, trimmed deltas and elected signs."""
        draw = torch.Generator().manual_seed(0)
        values = torch.randn(1 << 19, generator=draw) * 10.0 ** torch.randint(-8, 1, (1 << 19,), generator=draw)
        a, base = export("a", {"w": values}), export("base", {"w": torch.zeros(1 << 19)})
        code = (
            "import sys, re\n"
            "from pathlib import Path\n"
            "from keye_train.merging import merge, streaming\n"
            "from keye_train.settings import MergeMethod, MergeSettings\n"
            "streaming.BUDGET_BYTES = 160 << 20\n"
            "def kib(name): return int(re.search(name + r':\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
            "before = kib('VmRSS')\n"
            "merge(MergeSettings(models=[sys.argv[1]] * 8, base=sys.argv[2], out=sys.argv[3],\n"
            "    method=MergeMethod.ties, weights=[1.0] * 8, threads=16), progress=False)\n"
            "print(kib('VmHWM') - before)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(a), str(base), str(tmp_path / "out")], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) << 10 < 160 << 20
