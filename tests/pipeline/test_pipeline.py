"""Promise: the whole chain runs from nothing, ends with a report, keeps finished parts, and goes on after a stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from keye_train.compose import load_settings
from keye_train.pipeline import stage_settings
from keye_train.report.lines import curve_lines, diagnosis_lines, soup_lines
from keye_train.settings import PipelineSettings
from keye_train.training.trainer import train

pytest.importorskip("sklearn", reason="the demo's pictures come from the [demo] extra")
pytestmark = pytest.mark.timeout(900)  # one chain stands behind most of these tests

PROGRAM = [str(Path(sys.executable).parent / "keye-pipeline"), "pipeline=smoke"]
HELD = str(Path(__file__).parents[1] / "training" / "held.py")
RUNS = ["stage0", "stage1", "stage2", "stage3_anneal_a", "stage3_anneal_b"]


def _run(folder: Path, *overrides: str, timeout: float = 420) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *overrides], cwd=folder, capture_output=True, text=True, timeout=timeout, check=False
    )


def _interrupt(folder: Path, *launcher: str) -> str:
    """Start a chain, send SIGINT to its process group, as a terminal does, while stage 0 trains; what it printed.

    Stage 0 waits for the signal behind its first step: it has three, which take no time.
    """
    words = [*(launcher or [sys.executable]), HELD, "1", "{arguments}"]
    process = subprocess.Popen(
        [*PROGRAM, f"launcher={json.dumps(words)}"],
        cwd=folder,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = folder / "runs" / "smoke" / "stage0" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n") >= 1):
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 130, output
    assert "Run the same command again" in output
    return output


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the smoke pipeline, stopped in its first stage and gone on with by a second call."""
    folder = tmp_path_factory.mktemp("chain")
    _interrupt(folder)
    done = _run(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def test_every_part_is_there_and_names_its_parent(chain: Path) -> None:
    root = chain / "runs" / "smoke"
    parents = {}
    for name in RUNS:
        manifest = json.loads((root / name / "manifest.json").read_text())
        assert manifest["status"] == "finished"
        for field in ("recipe_sha256", "seed", "data_fingerprint", "commit", "versions"):
            assert field in manifest
        parents[name] = manifest["parent"] and Path(manifest["parent"]["path"]).name
        assert (root / name / "export" / "model.safetensors").exists()
    assert parents == {
        "stage0": None,
        "stage1": "stage0",
        "stage2": "stage1",
        "stage3_anneal_a": "stage2",
        "stage3_anneal_b": "stage2",
    }
    merged = json.loads((root / "merge" / "manifest.json").read_text())
    assert len(merged["parents"]) == 2


def test_branches_are_diagnosed_and_mixed_and_every_accepted_soup_is_evaluated(chain: Path) -> None:
    root = chain / "runs" / "smoke"
    found = {name: json.loads((root / "soup" / f"{name}.json").read_text()) for name in ("diagnosis", "curve", "soup")}
    assert found["diagnosis"]["base"] == "stage2"
    assert found["diagnosis"]["models"] == RUNS[3:]
    assert [point["t"] for point in found["curve"]["points"]] == [0, 0.5, 1]
    assert [row["name"] for row in found["soup"]["rows"]] == [*RUNS[3:], "uniform", "soup_greedy", "soup_weights"]
    results = json.loads((root / "evaluation" / "results.json").read_text())
    evaluated = {model["name"]: model for model in results["models"]}
    assert set(evaluated) == {"start", *RUNS, "merge", *found["soup"]["written"]}
    # The table of the soups and that of the evaluation are about the same samples.
    for row in found["soup"]["rows"][:2]:
        assert row["metric"] == pytest.approx(evaluated[row["name"]]["mean_loss"], rel=1e-5)
    page = (root / "merge.html").read_text(encoding="utf-8")
    assert "soup_weights" in page
    assert 'href="report.html"' in page
    report = (root / "report.html").read_text(encoding="utf-8")
    assert 'href="merge.html"' in report
    assert all(f">{name}: " in report for name in ("uniform", "soup_greedy", "soup_weights"))  # their verdicts


def test_the_report_is_one_page_with_the_table_of_every_model(chain: Path) -> None:
    page = (chain / "runs" / "smoke" / "report.html").read_text(encoding="utf-8")
    results = json.loads((chain / "runs" / "smoke" / "evaluation" / "results.json").read_text())
    names = ["start", *RUNS, "merge"]
    assert json.dumps(results).count("stage3_anneal_b") >= 1
    for name in names:
        assert name in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_a_second_call_keeps_what_is_finished(chain: Path) -> None:
    root = chain / "runs" / "smoke"
    kept = [*root.glob("*/export/*.safetensors"), root / "soup" / "diagnosis.json"]
    before = {path: path.stat().st_mtime_ns for path in kept}
    done = _run(chain)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert done.stdout.count("already finished, kept") == len([*RUNS, "diagnosis"])
    for name, lines in (("diagnosis", diagnosis_lines), ("curve", curve_lines), ("soup", soup_lines)):
        file = Path("runs") / "smoke" / "soup" / f"{name}.json"
        assert lines(json.loads((chain / file).read_text()), file) + "\n" in done.stdout


def test_an_interrupted_chain_goes_on_to_the_same_weights(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against its first stages, never stopped, each trained from the export of the one before."""
    monkeypatch.chdir(chain)
    settings = load_settings(PipelineSettings, "pipeline", ["pipeline=smoke", "out=runs/straight"])
    for name in ("stage0", "stage1"):
        (run,) = (run for run in settings.runs() if run.name == name)
        assert train(stage_settings(settings, run)) == 0
        ours = (chain / "runs" / "smoke" / name / "export" / "model.safetensors").read_bytes()
        assert ours == (chain / "runs" / "straight" / name / "export" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_an_interrupt_behind_a_launcher_is_not_taken_for_a_failure(tmp_path: Path, chain: Path) -> None:
    (tmp_path / "data").symlink_to(chain / "data")
    output = _interrupt(tmp_path, "torchrun", "--standalone", "--nproc-per-node", "2")
    assert "mend the cause" not in output
    assert list((tmp_path / "runs" / "smoke" / "stage0" / "checkpoints").glob("step-*"))


def test_branches_that_could_not_be_merged_stop_the_chain_before_it_begins(tmp_path: Path) -> None:
    more = 'stages.stage3.overrides=["data.resolution.image_max_tokens=9"]'
    done = _run(tmp_path, more, "merged=[stage2,stage3]", "soup=null")
    assert done.returncode != 0
    assert "stage2 and stage3_anneal_a train with different budgets" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_failing_part_stops_the_chain_and_says_so(tmp_path: Path) -> None:
    done = _run(tmp_path, "prepare=[keye-data,stats,nowhere-*.tar]")
    assert done.returncode != 0
    assert "run the same command again" in done.stderr
    assert "nowhere-" in done.stdout + done.stderr
