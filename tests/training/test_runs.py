"""Whole runs of ``keye-train`` on real shards: any launcher, any interruption, the same model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from corpus import ToyCorpus
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from data_tools.shards import sample_key, write_shard
from keye_train import runs
from keye_train.data.index import tokenizer_fingerprint
from keye_train.data.indexing import build_index
from keye_train.data.ledger import read_ledger
from keye_train.merging import MergeError, merge
from keye_train.merging.diagnosis import diagnose
from keye_train.report.collect import read_root
from keye_train.report.difference import compare_runs
from keye_train.report.forecasts import forecast_table
from keye_train.settings import (
    CurveSettings,
    DataSettings,
    DiagnosisSettings,
    MergeMethod,
    MergeSettings,
    SettingsError,
    SoupSettings,
    SourceSettings,
)
from keye_train.soups import draw_curve, search_soup
from keye_train.training.trainer import train

STAGE = "2_multitask"
STEPS = 8
LONG = (f"stage.steps={STEPS}", "deepspeed.zero_stage=3", "checkpoint.every_steps=3")
HELD = [str(Path(__file__).with_name("held.py")), "2"]  # steps before a run waits for its signal


def weights(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / runs.EXPORT / "model.safetensors")


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in runs.read_jsonl(run_dir / runs.METRICS)]


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.fixture(scope="module")
def one_process(toy_corpus: ToyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run in one process, started without a launcher."""
    run_dir = tmp_path_factory.mktemp("runs") / "one"
    assert train(toy_corpus.settings(STAGE, run_dir, *LONG, "deepspeed.zero_stage=0")) == 0
    return run_dir


@pytest.fixture(scope="module")
def two_processes(toy_corpus: ToyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted ZeRO-3 run on two ranks."""
    run_dir = tmp_path_factory.mktemp("runs") / "two"
    ranks.run(toy_corpus.command([*ranks.torchrun(2), "-m"], STAGE, run_dir, *LONG))
    return run_dir


def interrupt(launcher: list[str], words: list[str], run_dir: Path, number: signal.Signals, group: bool) -> int:
    """Start a run that waits behind its second step, send it a signal, and return its exit code."""
    process = ranks.start([*launcher, *HELD, *words])
    deadline = time.monotonic() + ranks.LONGEST_S
    while len(runs.read_jsonl(run_dir / runs.METRICS)) < 2 and process.poll() is None:
        assert time.monotonic() < deadline, "the run does not get to the step"
        time.sleep(0.01)
    (os.killpg if group else os.kill)(process.pid, number)
    output, _ = process.communicate(timeout=ranks.LONGEST_S)
    assert not (run_dir / runs.EXPORT).exists(), output
    assert len(losses(run_dir)) == 3, output  # the step that was to begin is made to its end
    return process.returncode


class TestOneModelWhateverTheRanks:
    """Text-only packs, pictures and clips mixed over two ZeRO-3 ranks give the losses of one process."""

    def test_torchrun(self, one_process: Path, two_processes: Path) -> None:
        assert losses(two_processes) == pytest.approx(losses(one_process), rel=1e-5)
        assert losses(one_process)[-1] < losses(one_process)[0]

    def test_deepspeed_launcher(self, toy_corpus: ToyCorpus, one_process: Path, tmp_path: Path) -> None:
        run_dir = tmp_path / "run"
        short = ("stage.steps=3", "deepspeed.zero_stage=3", "stage.activation_checkpointing=full")
        with ranks.reserved_port() as port:
            ranks.run(toy_corpus.command(ranks.deepspeed(2, port), STAGE, run_dir, *short))
        assert losses(run_dir) == pytest.approx(losses(one_process)[:3], rel=1e-5)

    def test_diff_finds_nothing_but_what_was_changed(self, one_process: Path, two_processes: Path) -> None:
        assert compare_runs(one_process, one_process).same
        found = compare_runs(one_process, two_processes).differences
        assert [one.key for one in found["recipe"]] == ["deepspeed.zero_stage"]
        # Somebody who works on this checkout may commit while the tests run.
        assert [one.key for one in found["code"] if one.key != "commit"] == ["ranks"]
        assert found["data"] == []
        assert runs.read_json(one_process / runs.MANIFEST)["data"]["text"]["samples"] == 16

    def test_packs_hold_what_this_test_is_about(self, one_process: Path) -> None:
        """Every source was trained on, also the broken picture's, and packs differ in what they hold."""
        rows = runs.read_jsonl(one_process / runs.METRICS)
        assert {source for row in rows for source in row["loss_by_source"]} == {"pairs", "images", "clips", "text"}
        assert {"000000005"} == {row["key"] for row in read_ledger(one_process)}
        assert sum(row["skipped"] for row in rows) == len(read_ledger(one_process))

    def test_figures_are_of_all_ranks(self, one_process: Path, two_processes: Path) -> None:
        tasks = {"pairs": "caption", "images": "colour", "clips": "video", "text": "text"}
        both = (runs.read_jsonl(folder / runs.METRICS) for folder in (one_process, two_processes))
        for one, two in zip(*both, strict=True):
            for row in (one, two):
                by_task = {tasks[source]: loss for source, loss in row["loss_by_source"].items()}
                assert row["loss_by_task"] == pytest.approx(by_task)
                assert 0 <= row["data_wait_share"] <= 1
            assert two["loss_by_task"] == pytest.approx(one["loss_by_task"], rel=1e-5)
            for figure in ("tokens", "patches", "samples", "labelled_tokens", "fill", "patch_fill"):
                assert one[figure] == two[figure]
            assert one["flops_per_s"] * one["step_s"] == pytest.approx(two["flops_per_s"] * two["step_s"])
            assert one["balance"] == 1
            assert 0.5 < two["balance"] <= 1

    def test_report_holds_the_forecast_against_the_run(self, one_process: Path, two_processes: Path) -> None:
        for run in (one_process, two_processes):
            table = forecast_table(read_root(run))
            assert table is not None
            cells = dict(zip(table.heads[1:], table.rows[0].cells, strict=True))
            apart = {name: float(re.findall(r"\(([+-][0-9.]+)%\)", cells[name].note)[0]) for name in list(cells)[:5]}
            for name in ("samples a step", "tokens a step", "patches a step"):
                assert abs(apart[name]) < 15, apart  # the plan of the first steps for all
            assert 0 <= apart["FLOPs a step"] < 100, (
                apart
            )  # all text counts as labelled, and most of the toy is its output matrix
            assert -10 < apart["checkpoint, bytes"] <= 0, apart  # headers of the files
            assert cells["device memory, bytes"].text == "–"  # no GPU

    def test_weights_agree_to_rounding(self, one_process: Path, two_processes: Path) -> None:
        ours, reference = weights(two_processes), weights(one_process)
        for name, expected in reference.items():
            # Adam turns rounding of a gradient near zero into a step of up to its learning rate.
            torch.testing.assert_close(ours[name], expected, rtol=0, atol=2e-3)


class TestHeldoutLosses:
    """Looking at held-out samples on the way changes nothing."""

    EVALUATED = ("evaluation.every_steps=3", "evaluation.max_samples=7", "logging.every_steps=2")

    def test_two_ranks_train_alike_and_say_it_once(
        self, toy_corpus: ToyCorpus, one_process: Path, two_processes: Path, tmp_path: Path
    ) -> None:
        run_dir, alone = tmp_path / "two", tmp_path / "one"
        words = toy_corpus.command(["-m"], STAGE, run_dir, *LONG, *self.EVALUATED)
        output = ranks.forked(2, words)
        assert differing(weights(run_dir), weights(two_processes)) == []
        assert train(toy_corpus.settings(STAGE, alone, *LONG, "deepspeed.zero_stage=0", *self.EVALUATED)) == 0
        assert differing(weights(alone), weights(one_process)) == []
        both = [runs.read_jsonl(folder / runs.METRICS) for folder in (run_dir, alone)]
        for two, one in zip(*both, strict=True):
            assert one["step"] == two["step"]
            assert two["loss"] == losses(two_processes)[two["step"] - 1]
            assert ("heldout_loss" in one) == (one["step"] in (3, 6, STEPS))
            if "heldout_loss" in one:
                assert set(one["heldout_loss"]) == {"images", "clips", "text"}
                assert two["heldout_loss"] == pytest.approx(one["heldout_loss"], rel=1e-5)
        assert (
            output.count("trainable parameters") == output.count(f"step {STEPS}/{STEPS}") == 1
        )  # other ranks are quiet


class TestInterruptedEqualsUninterrupted:
    """Bit for bit at the same world size; to rounding at another one."""

    def test_sigterm_in_one_process(
        self, toy_corpus: ToyCorpus, one_process: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        run_dir = tmp_path / "run"
        more = (*LONG, "deepspeed.zero_stage=0", "data.workers=1")
        words = toy_corpus.words(STAGE, run_dir, *more)
        assert interrupt([sys.executable], words, run_dir, signal.SIGTERM, group=False) == 143
        done = len(losses(run_dir))
        recipe = toy_corpus.settings(STAGE, run_dir, *more)
        caplog.set_level("INFO")
        assert train(recipe) == 0
        assert f"continuing from {run_dir}/checkpoints/step-{done}" in caplog.text
        assert losses(run_dir) == losses(one_process)
        assert differing(weights(run_dir), weights(one_process)) == []
        assert read_ledger(run_dir) == read_ledger(one_process)
        assert train(recipe) == 0
        assert "already finished" in caplog.text

    def test_ctrl_c_on_two_ranks_then_two_or_one(
        self, toy_corpus: ToyCorpus, one_process: Path, two_processes: Path, tmp_path: Path
    ) -> None:
        """Ctrl-C reaches the launcher and the ranks, and the launcher hands it on: the ranks get it twice."""
        run_dir, copy = tmp_path / "run", tmp_path / "copy"
        words = toy_corpus.words(STAGE, run_dir, *LONG)
        interrupt(ranks.torchrun(2), words, run_dir, signal.SIGINT, group=True)
        done = len(losses(run_dir))
        assert [path.name for path in (run_dir / runs.CHECKPOINTS).iterdir() if path.name == f"step-{done}"]
        shutil.copytree(run_dir, copy)
        ranks.forked(2, ["-m", "keye_train", *words])
        assert losses(run_dir) == losses(two_processes)
        assert differing(weights(run_dir), weights(two_processes)) == []
        assert train(toy_corpus.settings(STAGE, copy, *LONG, "deepspeed.zero_stage=1")) == 0
        assert losses(copy) == pytest.approx(losses(one_process), rel=1e-5)
        tokens = [[row["tokens"] for row in runs.read_jsonl(folder / runs.METRICS)] for folder in (copy, one_process)]
        assert tokens[0] == tokens[1]

    @pytest.mark.slow
    def test_sigusr1_to_one_rank_ends_all_within_30_s(self, toy_corpus: ToyCorpus, tmp_path: Path) -> None:
        run_dir = tmp_path / "run"
        more = ("stage.steps=5000", "deepspeed.zero_stage=3", "guards.heartbeat_s=0.2")
        process = ranks.start(toy_corpus.command([*ranks.torchrun(2), "-m"], STAGE, run_dir, *more))
        deadline = time.monotonic() + 200
        while len(runs.read_jsonl(run_dir / runs.METRICS)) < 3:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the run does not get to the step"
            time.sleep(0.01)
        os.kill(runs.read_json(run_dir / runs.HEARTBEATS / "rank-00001.json")["pid"], signal.SIGUSR1)
        output, _ = process.communicate(timeout=30)
        assert "exitcode  : 138" in output
        assert f"step-{len(losses(run_dir))}" in {path.name for path in (run_dir / runs.CHECKPOINTS).iterdir()}

    def test_torn_checkpoint_is_passed_over(
        self, toy_corpus: ToyCorpus, one_process: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        run_dir = tmp_path / "run"
        recipe = toy_corpus.settings(STAGE, run_dir, *LONG, "deepspeed.zero_stage=0")
        assert train(recipe) == 0
        _forget_the_end(run_dir)
        newest = run_dir / runs.CHECKPOINTS / f"step-{STEPS}"
        shard = next(newest.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-100])
        (run_dir / runs.CHECKPOINTS / ".step-99.tmp").mkdir()  # a save that was killed
        assert train(recipe) == 0
        assert f"step-{STEPS} is torn" in caplog.text
        assert losses(run_dir) == losses(one_process)
        assert differing(weights(run_dir), weights(one_process)) == []

    def test_newest_checkpoints_are_kept(self, one_process: Path) -> None:
        assert sorted(path.name for path in (one_process / runs.CHECKPOINTS).iterdir()) == ["step-6", f"step-{STEPS}"]


def _forget_the_end(run_dir: Path) -> None:
    """As if the process had died before its export was whole."""
    manifest = runs.read_json(run_dir / runs.MANIFEST)
    runs.write_json_atomic(run_dir / runs.MANIFEST, manifest | {"status": "running"})


class TestCommandsAboutAverages:
    """Checkpoints of two ranks are taken as they are, and stand for the models that they would be exported as."""

    @pytest.fixture
    def pairs(self, two_processes: Path, tmp_path: Path) -> list[list[str]]:
        """The two newest checkpoints; and the models that they stand for as exports."""
        sharded = [str(two_processes / runs.CHECKPOINTS / f"step-{step}") for step in (6, STEPS)]
        assert len(list(Path(sharded[0]).glob("rank-*.safetensors"))) == 2
        first = MergeSettings(sharded, str(tmp_path / "first"), method=MergeMethod.weighted, weights=[1.0, 0.0])
        return [sharded, [str(merge(first, progress=False)), str(two_processes)]]

    @pytest.fixture
    def asked(self, toy_corpus: ToyCorpus, tmp_path: Path) -> DataSettings:
        """Six held-out samples with an answer."""
        shard, tokenizer = tmp_path / "asked-0.tar", toy_corpus.folder / "tokenizer"
        talks = [(f"What is {n} plus {n}?", f"{2 * n}") for n in range(6)]
        records = [
            {
                "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": reply}],
                "answer": reply,
                "metric": "exact",
            }
            for text, reply in talks
        ]
        write_shard(shard, ((sample_key(n), {"json": json.dumps(one).encode()}) for n, one in enumerate(records)))
        build_index(shard, PreTrainedTokenizerFast.from_pretrained(tokenizer), tokenizer_fingerprint(tokenizer))
        return replace(toy_corpus.settings(STAGE, tmp_path).data, heldout={"sums": SourceSettings([str(shard)])})

    def test_diagnosis(self, pairs: list[list[str]], one_process: Path, tmp_path: Path) -> None:
        sharded, exported = (
            runs.read_json(
                diagnose(DiagnosisSettings(models=models, base=str(one_process), out=str(tmp_path / str(n))), False)
            )
            for n, models in enumerate(pairs)
        )
        assert sharded["models"] == ["two/step-6", f"two/step-{STEPS}"]
        assert sharded["modules"] == exported["modules"]
        assert sharded["modules"]["all"]["distance"][0][1] > 0

    def test_curve_and_search(self, asked: DataSettings, pairs: list[list[str]], tmp_path: Path) -> None:
        few: dict[str, Any] = {"data": asked, "samples_per_task": 3}
        curves = [
            runs.read_json(draw_curve(CurveSettings(models=models, out=str(tmp_path / str(n)), points=3, **few), False))
            for n, models in enumerate(pairs)
        ]
        assert curves[0]["points"] == curves[1]["points"]
        wanted = SoupSettings(models=pairs[0], out=str(tmp_path / "soup"), selection_per_task=3, budget=6, **few)
        found = runs.read_json(search_soup(wanted, False))
        ends = [curves[0]["points"][place]["metric"] for place in (0, -1)]
        assert [row["metric"] for row in found["rows"][:2]] == ends
        assert found["paths"] == pairs[0]

    def test_one_that_is_damaged(self, asked: DataSettings, two_processes: Path, tmp_path: Path) -> None:
        run_dir = tmp_path / "run"
        shutil.copytree(two_processes, run_dir)
        models = [run_dir / runs.CHECKPOINTS / f"step-{step}" for step in (6, STEPS)]
        shard = models[1] / "rank-00001.safetensors"
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        wanted = CurveSettings(models=[str(model) for model in models], data=asked, out=str(tmp_path / "curve"))
        with pytest.raises(MergeError, match=rf"{shard} does not match the checksum of its checkpoint"):
            draw_curve(wanted, progress=False)


class TestRunFolder:
    def test_another_recipe_is_refused_by_name(self, toy_corpus: ToyCorpus, one_process: Path) -> None:
        other = toy_corpus.settings(STAGE, one_process, *LONG, "stage.optimizer.lr=1e-2", "seed=7")
        with pytest.raises(SettingsError, match=r"seed: 0 there, 7 now; stage\.optimizer\.lr: 0\.001 there, 0\.01 now"):
            train(other)

    def test_logging_and_sharding_may_change(self, toy_corpus: ToyCorpus, one_process: Path) -> None:
        changed = toy_corpus.settings(STAGE, one_process, *LONG, "logging.every_steps=3", "deepspeed.zero_stage=1")
        assert train(changed) == 0

    def test_manifest_tells_where_the_model_comes_from(self, one_process: Path) -> None:
        manifest = runs.read_json(one_process / runs.MANIFEST)
        assert manifest == runs.read_json(one_process / runs.EXPORT / runs.MANIFEST)
        assert manifest["status"] == "finished"
        assert manifest["steps"] == manifest["updates"] == STEPS
        assert manifest["recipe"]["stage"]["name"] == STAGE
        assert set(manifest) >= {"parent", "seed", "data_fingerprint", "versions", "commit", "wall_s", "recipe_sha256"}

    def test_export_stands_alone(self, one_process: Path) -> None:
        names = {path.name for path in (one_process / runs.EXPORT).iterdir()}
        assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
