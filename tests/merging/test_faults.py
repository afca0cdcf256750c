"""Killed, out of space, damaged: nothing is half-written, the same command goes on, ``verify`` tells."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from keye_train.merging import MergeError, merge, shard_file, sources
from keye_train.merging import output as output_module
from keye_train.merging.output import DiskFull
from keye_train.merging.reading import ExportReader
from keye_train.merging.shard_file import PlannedTensor, ShardFile
from keye_train.merging.verify import verify
from keye_train.settings import MergeMethod, MergeSettings, SettingsError

Export = Callable[..., Path]
SHARD = 70_000


def large(seed: int) -> dict[str, Tensor]:
    """Eight tensors of 64 KB, each one shard."""
    draw = torch.Generator().manual_seed(seed)
    return {f"model.{i}": torch.randn(128, 128, generator=draw) for i in range(8)}


def settings_for(folders: list[Path], out: Path, **values: object) -> MergeSettings:
    values = {"max_shard_bytes": SHARD, **values}
    return MergeSettings(models=[str(f) for f in folders], out=str(out), **values)  # type: ignore[arg-type]


@pytest.fixture
def pair(export: Export) -> list[Path]:
    """Two models of eight shards."""
    return [export(f"m{i}", large(i)) for i in range(2)]


def interrupt(
    settings: MergeSettings, monkeypatch: pytest.MonkeyPatch, when: Callable[[output_module.PartialOutput, str], bool]
) -> None:
    """Merge until a file is noted as whole of which ``when`` holds; then Ctrl-C."""
    add = output_module.PartialOutput.add

    def interrupted(self: output_module.PartialOutput, name: str, sha256: str) -> None:
        add(self, name, sha256)
        if when(self, name):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(output_module.PartialOutput, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge(settings, progress=False)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("model*")}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"method": MergeMethod.spherical, "weights": [1.0, 2.0]},
        {"method": MergeMethod.ties, "weights": [1.0, 2.0], "base": "base"},
        {"method": MergeMethod.dare_ties, "weights": [1.0, 2.0], "base": "base", "density": 0.3},
    ],
    ids=lambda values: str(values.get("method", "uniform")),
)
def test_bits_do_not_depend_on_threads(export: Export, tmp_path: Path, values: dict[str, object]) -> None:
    draw = torch.Generator().manual_seed(9)
    folders = [
        export(f"m{i}", {"w": torch.randn(1_300_000, generator=draw).bfloat16(), "v": torch.randn(3, generator=draw)})
        for i in range(3)
    ]
    values = dict(values)
    if "base" in values:
        values["base"] = str(folders[2])
    results = [
        weights(merge(settings_for(folders[:2], tmp_path / f"t{n}", threads=n, **values), progress=False))
        for n in (1, 2, 7)
    ]
    assert results[0] == results[1] == results[2]


def test_an_error_of_the_disk_between_flushes_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, "the disk is dying")

    monkeypatch.setattr(shard_file, "FLUSH_BYTES", 1)
    monkeypatch.setattr(shard_file.os, "fdatasync", failing)

    def written() -> None:
        with ShardFile(tmp_path / "x", [PlannedTensor("w", torch.float32, (8,))]) as shard:
            shard.write(torch.ones(8))

    with pytest.raises(OSError, match="the disk is dying"):
        written()


def test_killed_and_resumed(export: Export, tmp_path: Path) -> None:
    """kill -9 as soon as two shards are whole; the next run keeps what is whole and ends with the same bytes."""
    folders = [export(f"m{i}", large(i)) for i in range(3)]
    expected = weights(merge(settings_for(folders, tmp_path / "expected"), progress=False))
    code = (
        "import os, signal, sys\n"
        "from keye_train.merging import merge, output\n"
        "from keye_train.settings import MergeSettings\n"
        "add = output.PartialOutput.add\n"
        "def dying(self, name, sha256):\n"
        "    add(self, name, sha256)\n"
        "    if len(self.files) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "output.PartialOutput.add = dying\n"
        f"merge(MergeSettings(models=sys.argv[2:], out=sys.argv[1], max_shard_bytes={SHARD}), progress=False)\n"
    )
    out = tmp_path / "out"
    died = subprocess.run([sys.executable, "-c", code, str(out), *map(str, folders)], capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    partial = tmp_path / ".out.partial"
    assert not out.exists()
    whole = [path for path in partial.glob("*.safetensors") if path.read_bytes() == expected[path.name]]
    assert len(whole) == 2
    whole[1].write_bytes(whole[1].read_bytes()[:-1] + b"x")  # one of them rots meanwhile
    kept = whole[0].stat()
    merge(settings_for(folders, out), progress=False)
    assert weights(out) == expected  # the other one was written anew
    now = (out / whole[0].name).stat()
    assert (now.st_ino, now.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)
    assert not partial.exists()
    assert verify(out).faults == []


def test_inputs_that_changed_meanwhile_start_it_anew(
    export: Export, pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = settings_for(pair, tmp_path / "out")
    interrupt(wanted, monkeypatch, lambda partial, _: len(partial.files) == 3)
    assert len(list((tmp_path / ".out.partial").glob("*.safetensors"))) == 3
    shutil.rmtree(pair[1])
    export("m1", large(7))
    merge(wanted, progress=False)
    merge(settings_for(pair, tmp_path / "fresh"), progress=False)
    assert weights(tmp_path / "out") == weights(tmp_path / "fresh")


def test_a_companion_that_changes_between_kill_and_resume_is_the_new_one(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = settings_for(pair, tmp_path / "out")
    interrupt(wanted, monkeypatch, lambda _, name: name == "tokenizer.json")
    for folder in pair:
        before = (folder / "tokenizer.json").stat()
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace('"a"', '"b"'))  # of the same size,
        os.utime(folder / "tokenizer.json", ns=(before.st_atime_ns, before.st_mtime_ns))  # and with its old time
    out = merge(wanted, progress=False)
    assert '"b"' in (out / "tokenizer.json").read_text()
    assert verify(out).faults == []


def test_seals_are_checked_without_hash_inputs(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sealed(path: str) -> ExportReader:
        return ExportReader(Path(path), sealed={Path(path) / "model.safetensors": "0" * 64})

    monkeypatch.setattr(sources, "open_model", sealed)
    with pytest.raises(MergeError, match="does not match the checksum of its checkpoint"):
        merge(settings_for(pair, tmp_path / "out", hash_inputs=False), progress=False)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "keye_train_test", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system (root)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(pair: list[Path], tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = small_disk / "out"
    with pytest.raises(DiskFull, match=r"no space left on its disk.*to write: 524,288 bytes"):
        merge(settings_for(pair, out), progress=False)
    assert list(small_disk.iterdir()) == []
    # The forecast sees room that somebody else then takes: the disk itself says no, in the middle.
    monkeypatch.setattr(output_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))
    with pytest.raises(DiskFull, match=r"5 finished file\(s\) are kept in \.out\.partial"):
        merge(settings_for(pair, out), progress=False)
    assert not out.exists()
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    merge(settings_for(pair, out), progress=False)
    merge(settings_for(pair, tmp_path / "expected"), progress=False)
    assert weights(out) == weights(tmp_path / "expected")


class TestVerify:
    @pytest.fixture
    def merged(self, pair: list[Path], tmp_path: Path) -> Path:
        return merge(settings_for(pair, tmp_path / "out"), progress=False)

    def test_what_is_whole_has_no_faults(self, merged: Path) -> None:
        verdict = verify(merged)
        assert (verdict.faults, verdict.unchecked) == ([], [])
        assert "8 tensors" in " ".join(verdict.checked)

    def test_each_fault_is_named(self, merged: Path, tmp_path: Path) -> None:
        files = sorted(merged.glob("*.safetensors"))
        content = bytearray(files[0].read_bytes())
        content[-4:] = b"\x00\x00\xc0\x7f"  # NaN
        files[0].write_bytes(content)
        (merged / "tokenizer.json").unlink()
        parent = tmp_path / "m1" / "model.safetensors"
        parent.write_bytes(parent.read_bytes()[:-1] + b"\x01")
        shutil.rmtree(tmp_path / "m0")
        verdict = verify(merged)
        text = "\n".join(verdict.faults)
        for part in (
            f"{files[0]} does not match its checksum",
            "holds NaN or infinity",
            "tokenizer.json is missing",
            f"parent {parent} does not match its checksum",
        ):
            assert part in text
        assert len(verdict.faults) == 4, text
        assert verdict.unchecked == [f"parent {tmp_path / 'm0'} is no longer there"]

    def test_a_file_cut_off_and_a_list_that_does_not_fit(self, merged: Path) -> None:
        file = sorted(merged.glob("*.safetensors"))[3]
        os.truncate(file, file.stat().st_size - 8)
        assert any("is not a whole safetensors file" in fault for fault in verify(merged).faults)
        manifest = json.loads((merged / "manifest.json").read_text())
        (merged / "manifest.json").write_text(json.dumps(manifest | {"status": "unfinished"}))
        with pytest.raises(SettingsError, match="not that of a finished merge"):
            verify(merged)

    def test_without_hashes_of_the_inputs(self, pair: list[Path], tmp_path: Path) -> None:
        out = merge(settings_for(pair, tmp_path / "out", hash_inputs=False), progress=False)
        verdict = verify(out)
        assert verdict.faults == []
        assert len(verdict.unchecked) == 2
