"""Promise: a checkpoint is whole, of this run, and enough to export the model; a full disk costs nothing but itself."""

from __future__ import annotations

import errno
import fcntl
import io
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

import pytest
import torch
from corpus import ToyCorpus
from safetensors.torch import load_file, save_file

from keye_train import runs
from keye_train.checkpoints import CheckpointReader, fault, layout
from keye_train.cli import convert_main
from keye_train.data.loader import StepData
from keye_train.merging import MergeError, merge
from keye_train.merging.verify import verify
from keye_train.settings import MergeMethod, MergeSettings, SettingsError
from keye_train.training import distributed, learner, trainer
from keye_train.training.checkpoint import TrainState
from keye_train.training.counting import Counts
from keye_train.training.occupancy import LOCK, RunLock
from keye_train.training.recorder import read_flight
from keye_train.training.trainer import train

STAGE = "1_align"
STEPS = 8
SHORT = (
    f"stage.steps={STEPS}",
    "checkpoint.every_steps=2",
    "checkpoint.keep=1",
    "checkpoint.mark_every_steps=4",
    "stage.optimizer.ema_decay=0.9",
)


@pytest.fixture(scope="module")
def finished(toy_corpus: ToyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("checkpoints") / "run"
    assert train(toy_corpus.settings(STAGE, run_dir, *SHORT)) == 0
    return run_dir


@pytest.fixture
def unfinished(finished: Path, tmp_path: Path) -> Path:
    """The same as if it had died behind its last step, with the checkpoints of steps 4 and 8."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    for export in (runs.EXPORT, runs.EXPORT_EMA):
        shutil.rmtree(run_dir / export)
    manifest = runs.read_json(run_dir / runs.MANIFEST)
    runs.write_json_atomic(run_dir / runs.MANIFEST, manifest | {"status": "running"})
    return run_dir


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / runs.CHECKPOINTS).iterdir())


def weight_bytes(run_dir: Path, export: str = runs.EXPORT) -> bytes:
    return (run_dir / export / "model.safetensors").read_bytes()


def test_the_newest_and_the_marked_stay(finished: Path) -> None:
    assert checkpoints(finished) == ["step-4", "step-8"]
    assert (finished / runs.CHECKPOINTS / "step-4" / layout.KEEP).exists()


def test_it_holds_what_trains_and_nothing_else(finished: Path) -> None:
    reader = CheckpointReader(finished / runs.CHECKPOINTS / "step-8")
    assert reader.states == layout.STATES
    assert reader.names()
    assert all(name.startswith("mlp_AR.") for name in reader.names())
    exported = load_file(finished / runs.EXPORT / "model.safetensors")
    for name in reader.names():
        whole = reader.tensor(name)
        assert torch.equal(whole, exported[name].view_as(whole))
        assert torch.equal(torch.cat(list(reader.pieces(name, max_elements=100))), whole.flatten())
        assert torch.equal(reader.read(name, "exp_avg", 3, 7), reader.tensor(name, "exp_avg").flatten()[3:7])


def test_the_export_of_a_checkpoint_is_that_of_its_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    newest = finished / runs.CHECKPOINTS / "step-8"
    for name, more in ((runs.EXPORT, []), (runs.EXPORT_EMA, ["--average"])):
        with pytest.raises(SystemExit) as ended:
            convert_main(["export", str(newest), str(tmp_path / name), *more])
        assert ended.value.code == 0
        for file in (finished / name).iterdir():
            if file.name != runs.MANIFEST:
                assert (tmp_path / name / file.name).read_bytes() == file.read_bytes(), file.name
        manifest = runs.read_json(tmp_path / name / runs.MANIFEST)
        assert manifest["checkpoint"] == str(newest)
        assert manifest["steps"] == STEPS
        assert set(manifest) >= {"parent", "recipe", "versions", "data_fingerprint", "commit"}
    with pytest.raises(SystemExit):
        convert_main(["export", str(newest), str(tmp_path / "third"), "--code", "none"])
    assert "go with a second call" in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["cut", "flipped", "lost", "unsealed", "strange"])
def test_a_torn_one_is_passed_over(
    harm: str, unfinished: Path, finished: Path, toy_corpus: ToyCorpus, caplog: pytest.LogCaptureFixture
) -> None:
    newest = unfinished / runs.CHECKPOINTS / "step-8"
    shard = newest / "rank-00000.safetensors"
    data = bytearray(shard.read_bytes())
    if harm == "cut":
        shard.write_bytes(data[:-4])
    elif harm == "flipped":
        data[-1] ^= 1
        shard.write_bytes(data)
    elif harm == "lost":
        (newest / layout.INDEX).unlink()
    elif harm == "unsealed":
        (newest / layout.COMPLETE).unlink()
    else:
        shutil.copy(shard, newest / "rank-00001.safetensors")
    assert fault(newest) is not None
    if harm == "flipped":  # the others are no different from here on
        assert train(toy_corpus.settings(STAGE, unfinished, *SHORT)) == 0
        assert "step-8 is torn; it is now step-8.torn, falling back" in caplog.text
        assert checkpoints(unfinished) == ["step-4", "step-8", "step-8.torn"]
        assert weight_bytes(unfinished) == weight_bytes(finished)


def test_one_of_another_run_is_passed_over(
    unfinished: Path, finished: Path, toy_corpus: ToyCorpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other"
    assert train(toy_corpus.settings(STAGE, other, *SHORT, "seed=5")) == 0
    shutil.rmtree(unfinished / runs.CHECKPOINTS / "step-8")
    shutil.copytree(other / runs.CHECKPOINTS / "step-8", unfinished / runs.CHECKPOINTS / "step-8")
    assert train(toy_corpus.settings(STAGE, unfinished, *SHORT)) == 0
    assert "step-8 is of another run (seed: 5 there, 0 now); it is now step-8.foreign" in caplog.text
    assert weight_bytes(unfinished) == weight_bytes(finished)
    assert weight_bytes(unfinished, runs.EXPORT_EMA) == weight_bytes(finished, runs.EXPORT_EMA)


def test_the_format_before_this_one_is_still_read(unfinished: Path, finished: Path, toy_corpus: ToyCorpus) -> None:
    """Whole tensors by name, in any number of files, without index and manifest."""
    newest = unfinished / runs.CHECKPOINTS / "step-4"
    shutil.rmtree(unfinished / runs.CHECKPOINTS / "step-8")
    reader = CheckpointReader(newest)
    whole = {
        name if state == layout.WEIGHTS else f"{name}#{state}": reader.tensor(name, state)
        for name in reader.names()
        for state in reader.states
    }
    for path in newest.glob("*"):
        if path.name != layout.STATE:
            path.unlink()
    names = sorted(whole)
    save_file({name: whole[name] for name in names[::2]}, newest / "rank-00000-000.safetensors")
    save_file({name: whole[name] for name in names[1::2]}, newest / "rank-00001-000.safetensors")
    from keye_train.checkpoints.folder import seal

    files = {path.name: seal(path) for path in newest.iterdir()}
    runs.write_json_atomic(newest / layout.COMPLETE, {"files": files})
    assert train(toy_corpus.settings(STAGE, unfinished, *SHORT)) == 0
    assert weight_bytes(unfinished) == weight_bytes(finished)
    runs.write_json_atomic(newest / layout.COMPLETE, {"files": files, "format": 99})
    with pytest.raises(ValueError, match="format 99; this version of keye_train reads up to"):
        fault(newest)


class Disk:
    """A disk that can be made too small: a mounted one where that is allowed, else a limit on the size of files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.mounted = self._mount("size=64m")

    def resize(self, size: int | None) -> None:
        """Room for ``size`` bytes, or for everything."""
        if self.mounted:
            assert self._mount(f"remount,size={size or 64 << 20}")
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2 if size else self.limit[0], self.limit[1]))

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.folder)], check=True)

    def _mount(self, options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "keye_train_test", str(self.folder)]
        return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Where ``tmp_path / "run"`` has its checkpoints."""
    made = Disk(tmp_path / "run" / runs.CHECKPOINTS)
    yield made
    made.resize(None)
    made.close()


def test_a_full_disk_does_not_stop_the_training(
    finished: Path,
    toy_corpus: ToyCorpus,
    disk: Disk,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No room for a second checkpoint at step 4; that of step 2 stays, and the one of step 6 is written."""
    run_dir = disk.folder.parent
    one = sum(path.stat().st_size for path in (finished / runs.CHECKPOINTS / "step-8").iterdir())
    real = trainer.Saver.save
    seen: dict[int, list[str]] = {}

    def save(self: trainer.Saver, state: TrainState, settle: Callable[[], None]) -> None:
        disk.resize(one * 3 // 2 if state.step == 4 else None)
        real(self, state, settle)
        self.wait()
        seen[state.step] = checkpoints(run_dir)

    monkeypatch.setattr(trainer.Saver, "save", save)
    assert train(toy_corpus.settings(STAGE, run_dir, *SHORT)) == 0
    assert seen == {2: ["step-2"], 4: ["step-2"], 6: ["step-6"], 8: ["step-8"]}
    assert "NO CHECKPOINT OF STEP 4" in caplog.text
    assert "No space left" in caplog.text or "File too large" in caplog.text
    assert "a crash now would go back to step-2" in caplog.text
    assert weight_bytes(run_dir) == weight_bytes(finished)


class Device(io.FileIO):
    """A file of a device that is full now and then. It takes a part of the first row that has no room."""

    full = False
    left = 0

    def write(self, data: bytes | bytearray) -> int:  # type: ignore[override]
        if not Device.full:
            return super().write(data)
        if Device.left:
            Device.left -= 1
            return super().write(data[:3])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_rows_that_a_full_disk_does_not_take_wait_and_the_checkpoint_with_them(
    finished: Path,
    toy_corpus: ToyCorpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Metrics, ledger, account of the steps and flight recorder cannot be written in steps 3 to 5."""
    run_dir = tmp_path / "run"
    real_open, real_step, real_save = Path.open, learner.Learner.step, trainer.Saver.save
    seen: dict[int, list[str]] = {}

    def opened(self: Path, mode: str = "r", buffering: int = -1, **more: str) -> IO:
        return Device(self, mode) if buffering == 0 else real_open(self, mode, buffering, **more)

    def step(self: learner.Learner, data: StepData, counts: Counts) -> tuple:
        Device.full = 2 <= data.step <= 4
        Device.left = int(data.step == 2)
        return real_step(self, data, counts)

    def save(self: trainer.Saver, state: TrainState, settle: Callable[[], None]) -> None:
        real_save(self, state, settle)
        seen[state.step] = checkpoints(run_dir)
        if state.step != 4:
            assert self.figures is not None
            assert self.figures.stall_s >= self.figures.write_s > 0

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(learner.Learner, "step", step)
    monkeypatch.setattr(trainer.Saver, "save", save)
    assert train(toy_corpus.settings(STAGE, run_dir, *SHORT, "checkpoint.background=false")) == 0
    assert seen == {2: ["step-2"], 4: ["step-2"], 6: ["step-6"], 8: ["step-8"]}
    assert "NO CHECKPOINT OF STEP 4" in caplog.text
    assert caplog.text.count("trained.jsonl CANNOT BE WRITTEN") == caplog.text.count("metrics.jsonl CANNOT BE") == 1
    assert caplog.text.count("trained.jsonl is written again") == 1
    steps = list(range(1, STEPS + 1))
    assert [row["step"] for row in runs.read_jsonl(run_dir / runs.METRICS)] == steps
    assert [row["step"] for row in read_flight(run_dir, 0)] == steps
    for name in (runs.TRAINED, runs.LEDGER):
        assert (run_dir / name).read_text() == (finished / name).read_text()
    assert weight_bytes(run_dir) == weight_bytes(finished)


def test_marks_must_be_steps_that_are_saved(toy_corpus: ToyCorpus, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"mark_every_steps=3 is no multiple of checkpoint\.every_steps=2"):
        toy_corpus.settings(STAGE, tmp_path, *SHORT, "checkpoint.mark_every_steps=3")


def test_a_second_launch_waits_for_the_first_and_gives_up(tmp_path: Path) -> None:
    """The lock of a process goes with it, however it ends."""
    holder = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import fcntl, sys, time\n"
            f"file = open({str(tmp_path / LOCK)!r}, 'a+b'); fcntl.lockf(file, fcntl.LOCK_SH)\n"
            "print('held', flush=True); time.sleep(600)",
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    world = distributed.start(timeout_minutes=1)
    try:
        with pytest.raises(SettingsError, match="in use by another launch"):
            RunLock(tmp_path, world, patience_s=0.1)
    finally:
        holder.kill()
        holder.communicate()
    RunLock(tmp_path, world, patience_s=0.1).release()


def test_a_launch_that_wrote_nothing_takes_its_folder_away(tmp_path: Path) -> None:
    """But none that was there before, and none in which another launch waits or something stands."""
    world = distributed.start(timeout_minutes=1)
    run_dir = tmp_path / "runs" / "wrong_parent"
    RunLock(run_dir, world).release()
    assert not run_dir.exists()
    run_dir.mkdir()
    RunLock(run_dir, world).release()
    assert run_dir.exists()
    shutil.rmtree(run_dir)
    lock = RunLock(run_dir, world)
    (run_dir / runs.RECIPE).touch()
    lock.release()
    assert run_dir.exists()


def test_a_launch_that_waited_for_a_folder_that_went_away_makes_it_anew(tmp_path: Path) -> None:
    """Or it would hold a lock on a file that nobody else sees."""

    class Waited(RunLock):
        def _wait(self, file: BinaryIO, kind: int, patience_s: float) -> bool:
            if not gone:
                gone.append(True)
                shutil.rmtree(run_dir)
            return super()._wait(file, kind, patience_s)

    run_dir, gone = tmp_path / "run", list[bool]()
    lock = Waited(run_dir, distributed.start(timeout_minutes=1))
    assert (run_dir / LOCK).exists()
    code = f"import fcntl; fcntl.lockf(open({str(run_dir / LOCK)!r}, 'a+b'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode != 0
    lock.release()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: object) -> None:
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(SettingsError, match=r"run_dir=.*\.lock cannot be locked .*no locks here"):
        RunLock(tmp_path, distributed.start(timeout_minutes=1))


@pytest.mark.parametrize("other", ["has finished it", "has begun another recipe there"])
def test_what_happened_while_a_launch_waited_counts(
    other: str, unfinished: Path, finished: Path, toy_corpus: ToyCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another launch holds the folder, and lets it go when the files below are as they are."""

    class Waited(RunLock):
        def __init__(self, run_dir: Path, world: distributed.World) -> None:
            super().__init__(run_dir, world)
            if other == "has finished it":
                shutil.copyfile(finished / runs.MANIFEST, run_dir / runs.MANIFEST)
            else:
                text = (run_dir / runs.RECIPE).read_text()
                (run_dir / runs.RECIPE).write_text(text.replace("\nseed: 0\n", "\nseed: 7\n"))

    settings = toy_corpus.settings(STAGE, unfinished, *SHORT)
    monkeypatch.setattr(trainer, "RunLock", Waited)
    if other == "has finished it":
        recipe = runs.read_json(finished / runs.MANIFEST)["recipe_sha256"]
        assert recipe == runs.read_json(unfinished / runs.MANIFEST)["recipe_sha256"]
        assert train(settings) == 0
        assert not (unfinished / runs.EXPORT).exists()  # nothing was done
    else:
        with pytest.raises(SettingsError, match="seed: 7 there, 0 now"):
            train(settings)
    assert checkpoints(unfinished) == ["step-4", "step-8"]


def test_checkpoints_are_merged_without_conversion(finished: Path, tmp_path: Path) -> None:
    """The mean of the last two checkpoints is that of their exports; one with the run's own export changes no bit."""
    steps = checkpoints(finished)
    assert len(steps) == 2
    lawa = MergeSettings(
        models=[str(finished)], out=str(tmp_path / "lawa"), method=MergeMethod.lawa, last=2, dtype="float32"
    )
    merged = load_file(merge(lawa, progress=False) / "model.safetensors")
    exact = [CheckpointReader(finished / runs.CHECKPOINTS / step) for step in steps]
    for name in exact[0].names():
        mean = (exact[0].tensor(name).double() + exact[1].tensor(name).double()) / 2
        assert torch.equal(merged[name], mean.float()), name
    newest = finished / runs.CHECKPOINTS / "step-8"
    same = MergeSettings(models=[str(newest), str(finished)], out=str(tmp_path / "same"))
    found, own = (
        load_file(folder / "model.safetensors") for folder in (merge(same, progress=False), finished / runs.EXPORT)
    )
    assert found.keys() == own.keys() == merged.keys()
    assert all(torch.equal(found[name].view(torch.uint8), own[name].view(torch.uint8)) for name in own)
    assert verify(tmp_path / "same").faults == []


def test_a_damaged_checkpoint_is_not_merged(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    file = next((run_dir / runs.CHECKPOINTS / "step-8").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    lawa = MergeSettings(models=[str(run_dir)], out=str(tmp_path / "out"), method=MergeMethod.lawa, last=2)
    with pytest.raises(MergeError, match="does not match the checksum of its checkpoint"):
        merge(lawa, progress=False)
    file.unlink()
    with pytest.raises(SettingsError, match="is no whole checkpoint"):
        merge(lawa, progress=False)
    assert not (tmp_path / "out").exists()
