"""Every command that README.md and docs/ show exists and is understood by the program it names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from keye_train import compose
from keye_train.cli.chain import verify_parser
from keye_train.cli.soups import COMMANDS as MERGE_COMMANDS
from keye_train.cli.train import COMMANDS as TRAIN_COMMANDS
from keye_train.settings import (
    EvaluationSettings,
    ForecastSettings,
    MergeSettings,
    PipelineSettings,
    ReplaySettings,
    TrainSettings,
)

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "launch" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A command of keye-train that takes overrides stands here by both its words.
PROGRAMS = {
    "keye-train": (TrainSettings, "train"),
    "keye-train plan": (ForecastSettings, "forecast"),
    "keye-train replay": (ReplaySettings, "replay"),
    "keye-merge": (MergeSettings, "merge"),
    "keye-eval": (EvaluationSettings, "eval"),
    "keye-pipeline": (PipelineSettings, "pipeline"),
}


def _commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for language, block in re.findall(
            r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
        ):
            if language in ("python", "text", "mermaid"):  # an example and its output (test_docs.py), a diagram
                continue
            found += [(page.name, line.strip()) for line in block.splitlines() if line.strip()]
    return found


def _words(line: str) -> list[str]:
    """The words of a command, from the program on, whatever launches it."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words and words[0] in ("torchrun", "deepspeed"):
        return ["keye-train", *words[words.index("keye_train") + 1 :]]
    if words and words[0].startswith("launch/"):
        assert (ROOT / words[0]).exists(), words[0]
        return ["keye-train", *words[1:]]
    return words


@pytest.mark.parametrize(("page", "line"), _commands())
def test_a_shown_command_is_understood(page: str, line: str) -> None:
    words = _words(line)
    if words[0] == "keye-train" and words[1:2] and words[1] in TRAIN_COMMANDS:
        words = [" ".join(words[:2]), *words[2:]]
    program = words[0]
    if program in ("git", "cd", "pip", "wandb", "tensorboard"):
        return
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in words[1:]:
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{page}: make {target}"
    elif program in PROGRAMS:
        if "--help" in words:
            return
        if words[:2] == ["keye-merge", "verify"]:
            assert verify_parser().parse_args(words[2:]).out.name
            return
        schema, primary = PROGRAMS[program]
        if program == "keye-merge" and words[1] in MERGE_COMMANDS:
            schema, primary, words = MERGE_COMMANDS[words[1]].schema, words[1], words[1:]
        compose.load_settings(schema, primary, [word for word in words[1:] if not word.startswith("--")])
    elif program == "keye-train diff":
        from keye_train.cli.diff import parser

        parser().parse_args(words[1:])
    elif program == "keye-data":
        from data_tools.cli import build_parser

        build_parser().parse_args(words[1:])
    elif program == "keye-convert":
        from keye_train.cli import convert_parser

        convert_parser().parse_args(words[1:])
    elif program == "keye-report":
        assert words[1:], line
    else:
        pytest.fail(f"{page} shows '{line}', whose program this test does not know")
