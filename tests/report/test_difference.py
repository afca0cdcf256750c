"""Two runs beside each other: what differs is named with both values, and the exit code says whether anything does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from keye_train import runs
from keye_train.cli.train import train_main
from keye_train.report.difference import compare_runs


@pytest.fixture
def pair(run_writer: Callable[..., None], tmp_path: Path) -> tuple[Path, Path]:
    """A run and its copy."""
    a, b = tmp_path / "a", tmp_path / "b"
    run_writer(a, "3_anneal", "stage2", ["ocr"], steps=20)
    manifest = runs.read_json(a / runs.MANIFEST)
    manifest |= {"data": {"ocr": {"shards": 2, "samples": 40, "sha256": "aa"}}, "data_fingerprint": "f", "wall_s": 60.0}
    runs.write_json_atomic(a / runs.MANIFEST, manifest)
    lines = [json.dumps({"step": step, "samples": 20, "digest": 7 * step, "applied": True}) for step in range(20)]
    (a / runs.TRAINED).write_text("\n".join(lines) + "\n")
    shutil.copytree(a, b)
    return a, b


def rewrite(run: Path, **changes: object) -> None:
    runs.write_json_atomic(run / runs.MANIFEST, runs.read_json(run / runs.MANIFEST) | changes)


def leave(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        train_main(["diff", *words])
    assert isinstance(left.value.code, int)
    return left.value.code


def test_a_copy_differs_in_nothing(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(*map(str, pair)) == 0
    printed = capsys.readouterr().out
    assert "recipe: the same" in printed
    assert "loss: the same in all 20 steps that both have" in printed


def test_speed_is_told_and_not_judged(pair: tuple[Path, Path]) -> None:
    rewrite(pair[1], wall_s=120.0)
    comparison = compare_runs(*pair)
    assert comparison.same
    assert [one.key for one in comparison.differences["speed"]] == ["hours of training"]


def test_what_differs_stands_there_with_both_values(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = pair
    recipe = runs.read_json(b / runs.MANIFEST)["recipe"]
    recipe["stage"]["mixture"] = "other"
    data = {"ocr": {"shards": 3, "samples": 60, "sha256": "bb"}, "text": {"shards": 1, "samples": 9, "sha256": "cc"}}
    rewrite(b, recipe=recipe, data=data, versions={"torch": "2.14.0"}, commit="other", data_fingerprint="g")
    rows = runs.read_jsonl(b / runs.METRICS)
    rows[6]["loss"] = 9.5
    (b / runs.METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = runs.read_jsonl(b / runs.TRAINED)
    trained[11]["digest"] = 1
    (b / runs.TRAINED).write_text("".join(json.dumps(row) + "\n" for row in trained))

    assert leave(str(a), str(b), "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["same"]
    assert found["differences"]["recipe"] == [{"key": "stage.mixture", "a": "mix", "b": "other"}]
    by_key = {one["key"]: (one["a"], one["b"]) for section in found["differences"].values() for one in section}
    assert by_key["source.ocr.shards"] == (2, 3)
    assert by_key["source.text.samples"] == (None, 9)
    assert by_key["version.torch"] == ("2.13.0", "2.14.0")
    assert by_key["fingerprint of the plan"] == ("f", "g")
    assert found["notes"] == [
        "samples: the first difference is in step 12",
        f"loss: the first difference is in step 7, {4.0 / 7} and 9.5",
    ]
    assert leave(str(a), str(b)) == 1
    assert "stage.mixture" in capsys.readouterr().out


def test_what_is_no_run_is_named(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(str(pair[0]), str(tmp_path / "nowhere")) == 2
    assert "nowhere holds no manifest.json" in capsys.readouterr().err
