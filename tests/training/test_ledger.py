"""Promise: of a finished or resumed run every planned sample is found again, trained on or skipped with its reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from corpus import ToyCorpus

from data_tools.cli import main
from data_tools.shards import write_shard
from keye_train import runs
from keye_train.data.audit import audit_run
from keye_train.data.plan import AT_THE_END
from keye_train.data.reader import walk_shard
from keye_train.settings import SettingsError
from keye_train.training import learner, trainer
from keye_train.training.trainer import train

STAGE = "2_multitask"
BROKEN = "000000005"  # its picture is cut off behind a sound header

# Clips and large pictures have more patches than fit into a pack.
FITTING = ("stage.max_patches=32", "data.overlong=[downscale]")


def command(*arguments: str, name: str = "ledger") -> int | str:
    """Exit status, or the message of an error."""
    with pytest.raises(SystemExit) as ended:
        main([name, *arguments])
    return ended.value.code or 0


@pytest.fixture(scope="module")
def resumed(toy_corpus: ToyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps with samples made to fit; a crash after step 8 forgets those behind the checkpoint of step 5."""
    run_dir = tmp_path_factory.mktemp("ledger") / "run"
    settings = toy_corpus.settings(STAGE, run_dir, "stage.steps=12", "checkpoint.every_steps=5", *FITTING)
    real = learner.Learner.step

    def crash(self: learner.Learner, data, counts):
        if data.step == 8:
            raise RuntimeError("the machine goes down")
        return real(self, data, counts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner.Learner, "step", crash)
        with pytest.raises(RuntimeError, match="goes down"):
            train(settings)
    assert audit_run(run_dir).steps == 8
    assert train(settings) == 0
    return run_dir


def test_everything_planned_is_accounted_for_also_after_a_resume(resumed: Path, capsys: pytest.CaptureFixture) -> None:
    assert command(str(resumed)) == 0
    text = capsys.readouterr().out
    assert "12 steps" in text
    assert "broken image" in text
    assert command(str(resumed), "--json") == 0
    audit = json.loads(capsys.readouterr().out)
    metrics = runs.read_jsonl(resumed / runs.METRICS)
    sources = audit["sources"].values()
    assert audit["steps"] == len(runs.read_jsonl(resumed / runs.TRAINED)) == 12
    assert sum(one["trained"] + one["refused"] for one in sources) == sum(row["samples"] for row in metrics)
    assert {row["world_size"] for row in metrics} == {1}
    assert sum(sum(one["skipped"].values()) for one in sources) == sum(row["skipped"] for row in metrics) > 0
    assert all(one["repeated"] == 0 for one in sources)
    assert sum(one["changed"] for one in sources) == sum(row["changed"] for row in metrics) > 0
    for one in sources:
        assert one["planned"] == one["trained"] + one["refused"] + sum(one["skipped"].values())
        assert one["planned"] == pytest.approx(sum(one["coverage"]) * one["size"])


@pytest.mark.parametrize(
    "fault", ["a line of the ledger is lost", "a step is lost", "another sample was trained on", "a fit is lost"]
)
def test_what_is_neither_trained_nor_skipped_is_found(
    resumed: Path, tmp_path: Path, fault: str, capsys: pytest.CaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(resumed, run_dir, ignore=shutil.ignore_patterns("checkpoints", "export"))
    file = run_dir / (runs.LEDGER if "ledger" in fault else runs.TRAINED)
    rows = runs.read_jsonl(file)
    if "fit" in fault:
        rows[3]["changed"] -= 1
    elif "another" in fault:
        rows[3]["digest"] += 1
    else:
        del rows[min(4, len(rows) - 1)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command(str(run_dir)) == 1
    assert "1 problems" in capsys.readouterr().out
    (run_dir / runs.TRAINED).unlink()
    with pytest.raises(ValueError, match=r"trained\.jsonl"):
        audit_run(run_dir)


def test_quarantined_samples_are_left_out_and_can_be_read_apart(
    resumed: Path, toy_corpus: ToyCorpus, tmp_path: Path
) -> None:
    bad, again = tmp_path / "bad.jsonl", tmp_path / "again.tar"
    assert command(str(resumed), "--quarantine", str(bad), "--requeue", str(again)) == 0
    (entry,) = runs.read_jsonl(bad)
    assert (entry["key"], entry["row"]) == (BROKEN, 5)
    (copy,) = walk_shard(again)
    (original,) = (raw for raw in walk_shard(entry["shard"]) if raw.key == BROKEN)
    assert copy.members == original.members
    run_dir = tmp_path / "run"
    settings = toy_corpus.settings(STAGE, run_dir, "stage.steps=12", f"data.quarantine=[{bad}]", *FITTING)
    assert train(settings) == 0
    audit = audit_run(run_dir)
    assert audit.problems == []
    reasons = {reason for one in audit.sources for reason in one.skipped}
    assert reasons
    assert all(reason.startswith("quarantined (") for reason in reasons)
    with pytest.raises(SettingsError, match=r"data\.quarantine"):
        train(toy_corpus.settings(STAGE, run_dir, "stage.steps=12", *FITTING))
    with pytest.raises(ValueError, match="does not exist; write it with keye-data ledger"):
        train(toy_corpus.settings(STAGE, tmp_path / "other", "data.quarantine=[none.jsonl]"))


def test_requeued_samples_are_read_again_after_mending(
    resumed: Path, toy_corpus: ToyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bad, left, again = (str(tmp_path / name) for name in ("bad.jsonl", "left.jsonl", "again.tar"))
    assert command(str(resumed), "--quarantine", bad) == 0
    (entry,) = runs.read_jsonl(Path(bad))
    samples = [(raw.key, raw.members) for raw in walk_shard(entry["shard"])]
    mended = str(tmp_path / "mended.tar")
    whole = next(members for key, members in samples if key != BROKEN and "0.jpg" in members)
    write_shard(mended, ((key, whole if key == BROKEN else members) for key, members in samples[1:]))
    Path(bad).write_text("".join(json.dumps({**entry, "shard": mended, "key": k}) + "\n" for k in (BROKEN, "gone")))
    words = (bad, "--out", again, "--left", left, "--tokenizer", str(toy_corpus.folder / "tokenizer"))
    assert command(*words, name="requeue") == 2
    assert "has no index; run: keye-data index" in capsys.readouterr().err
    assert command(mended, "--tokenizer", words[-1], "--workers", "0", name="index") == 0
    assert command(*words, name="requeue") == 1  # one is gone
    assert "1 of 2 samples can be read now, 1 cannot" in capsys.readouterr().out
    (line,) = runs.read_jsonl(Path(left))
    assert (line["key"], line["row"], line["sha256"]) == ("gone", entry["row"], entry["sha256"])
    run_dir = tmp_path / "run"
    source = f"data.sources.images.shards=[{again}]"
    assert train(toy_corpus.settings(STAGE, run_dir, "stage.steps=2", source)) == 0
    audit = audit_run(run_dir)
    assert audit.problems == []
    assert next(one for one in audit.sources if one.name == "images").trained > 0


def test_a_run_to_the_end_of_filtered_data_is_accounted_for(
    toy_corpus: ToyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One epoch of two sources, one of them filtered: every row that passes comes once, then the run ends."""
    settings = toy_corpus.settings(
        STAGE,
        tmp_path / "run",
        "stage.steps=500",
        "data.sources.pairs.max_epochs=1",
        "data.sources.text.max_epochs=1",
        "data.sources.text.filter='text_tokens > 36'",
        "data.mixtures.multitask.images=0.0",
        "data.mixtures.multitask.clips=0.0",
    )
    assert train(settings) == 0
    audit = audit_run(tmp_path / "run")
    assert audit.problems == []
    assert 0 < audit.steps < 500
    pairs, text = sorted(audit.sources, key=lambda one: one.name)
    assert (pairs.planned, pairs.filtered) == (pairs.size, 0)
    assert text.planned + text.filtered == text.size
    assert text.filtered > 0
    assert all(one.repeated == 0 for one in audit.sources)
    rest = [line["reason"] for line in audit.skipped]
    assert rest  # less than a global batch was left,
    assert set(rest) <= {AT_THE_END, *(reason for reason in rest if "broken" in reason)}
    bad = tmp_path / "bad.jsonl"
    assert command(str(tmp_path / "run"), "--quarantine", str(bad)) == 0
    assert AT_THE_END not in bad.read_text()  # which says nothing against those samples
    saved: list[int] = []
    monkeypatch.setattr(trainer.Saver, "save", lambda *call: saved.append(call[1].step))
    shutil.rmtree(tmp_path / "run" / runs.EXPORT)  # killed between its last save and its export
    manifest = runs.read_json(tmp_path / "run" / runs.MANIFEST)
    runs.write_json_atomic(tmp_path / "run" / runs.MANIFEST, manifest | {"status": "running"})
    assert train(settings) == 0
    assert saved == []  # that step was saved
    assert (tmp_path / "run" / runs.EXPORT).exists()
