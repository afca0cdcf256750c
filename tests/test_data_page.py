"""The commands of docs/data.md do what the page says, in its order, on a small build of the demo's corpus."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from data_tools.cli import main

PAGE = Path(__file__).resolve().parent.parent / "docs" / "data.md"
SCALE = ("--scale", "0.02", "--workers", "1")


def commands() -> list[list[str]]:
    """Words of the keye-data commands behind the program's name."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    assert all(line.startswith("keye-data ") for line in lines), lines
    return [shlex.split(line)[1:] for line in lines]


def test_every_command_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = commands()
    assert {words[0] for words in shown} >= {"demo", "index", "check", "stats", "plan", "view"}
    for words in shown:
        if words[0] == "index":
            words += ["--workers", "1"]
        if "skipped=true" in words:
            words.append("scan_samples=5000")  # the build has a fiftieth of the samples
        with pytest.raises(SystemExit) as caught:
            main([*words, *SCALE] if words[0] == "demo" else words)
        assert caught.value.code == 0, f"keye-data {shlex.join(words)}: {caught.value.code}"
        assert capsys.readouterr().out.strip(), f"keye-data {shlex.join(words)} says nothing"
    for name in (word.removeprefix("out=") for words in shown for word in words if word.startswith("out=")):
        assert (tmp_path / name).stat().st_size > 10_000
    assert "stage.max_tokens=52" in (tmp_path / "skipped.html").read_text(encoding="utf-8")
