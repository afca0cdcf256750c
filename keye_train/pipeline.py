"""The whole chain as one resumable job: data, start, stages, merge, evaluation, report.

Every part leaves a finished manifest in a folder of its own; a second call starts where the first one stopped. Stages
run as processes of their own (behind ``launcher``, on as many ranks as it starts), so each begins with a clean state
and an interrupt reaches its ranks directly.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table

from keye_train import compose, runs
from keye_train.settings import (
    EvaluationSettings,
    MergeSettings,
    PipelineRun,
    PipelineSettings,
    SettingsError,
    TrainSettings,
)

log = logging.getLogger(__name__)

STATE = "pipeline.json"
START = "start"  # folder of the untrained model
MERGE = "merge"
EVALUATION = "evaluation"
REPORT = "report.html"


class PartFailed(RuntimeError):
    """A part ended with an error; its own message stands above."""

    def __init__(self, part: str, code: int) -> None:
        super().__init__(f"{part} ended with exit code {code}")
        self.code = code


@dataclass
class Part:
    """One finished or running part, for the clock."""

    name: str
    work: float  # tokens it may read: what the estimate of the time left goes by
    seconds: float = 0.0
    kept: bool = False  # finished by an earlier call


def run_pipeline(settings: PipelineSettings) -> int:
    """Run every part that is not finished yet.

    Returns:
        0, or the exit code of the part that failed or was interrupted (130 after Ctrl-C).
    """
    # Idle OpenMP threads sleep instead of spinning, here and in every process started below: where ranks and readers
    # share a few cores, spinning halves the speed. Read when torch is imported, so it stands before the first import.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    out = Path(settings.out)
    clock = _Clock(settings)  # composes every stage: what cannot work stops here, before any of them has run
    if settings.merged:
        merge_settings(settings)
        _check_merged_budgets(settings)
    evaluation_settings(settings)
    from keye_train.evaluation import evaluate
    from keye_train.merging import merge

    try:
        if settings.prepare:
            clock.begin("data")
            _call("data", settings.prepare)
            clock.end("data")
        _export_start(settings)
        for stage in settings.runs():
            clock.begin(stage.name)
            clock.end(stage.name, kept=_run_stage(settings, stage))
        if settings.merged:
            clock.begin(MERGE)
            merge(merge_settings(settings))
            clock.end(MERGE)
        clock.begin(EVALUATION)
        results = evaluate(evaluation_settings(settings))
        clock.end(EVALUATION)
    except PartFailed as failure:
        if failure.code in (130, 143):
            print("\nStopped. Run the same command again to go on.", file=sys.stderr)
        else:
            print(f"keye-pipeline: {failure}; mend the cause above and run the same command again", file=sys.stderr)
        return failure.code
    except KeyboardInterrupt:
        print("\nStopped. Run the same command again to go on.", file=sys.stderr)
        return 130
    runs.write_json_atomic(out / STATE, _state(settings, clock))
    from keye_train.report import write_report

    page = write_report(out, out / REPORT)
    clock.table(Console())
    print(f"results: {results}\nreport:  {page}")
    return 0


def stage_settings(settings: PipelineSettings, stage: PipelineRun) -> TrainSettings:
    """The settings that ``keye-train`` gets for one stage, checked."""
    return compose.load_settings(TrainSettings, "train", _overrides(settings, stage), compose.recipes_folder())


def _export_start(settings: PipelineSettings) -> None:
    """The untrained model, for the first row of the table."""
    from keye_train.training.export import write_start

    write_start(stage_settings(settings, settings.runs()[-1]), Path(settings.out) / START)


def _overrides(settings: PipelineSettings, stage: PipelineRun) -> list[str]:
    out = Path(settings.out)
    parent = "null" if stage.parent is None else str(out / stage.parent)
    return [
        f"stage={stage.stage}",
        f"model={settings.model}",
        f"data={settings.data}",
        f"run_dir={out / stage.name}",
        f"parent={parent}",
        *settings.overrides,
        *stage.overrides,
    ]


def _run_stage(settings: PipelineSettings, stage: PipelineRun) -> bool:
    """Run one stage unless its manifest says that this very recipe has finished; True where it had."""
    wanted = stage_settings(settings, stage)
    from keye_train.training.manifest import is_finished

    if is_finished(wanted):
        return True
    launcher = settings.launcher or [sys.executable]
    _call(stage.name, [*launcher, "-m", "keye_train", *_overrides(settings, stage)])
    return False


def _call(part: str, command: list[str]) -> None:
    """Run a command in the foreground; on Ctrl-C and SIGTERM it saves its state, and we wait for it.

    Raises:
        PartFailed: it ended with an error, or a signal stopped it.
    """
    log.info("%s: %s", part, " ".join(command))
    # Programs of this environment first, whether it is activated or not.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    process = subprocess.Popen(command, env={**os.environ, "PATH": path})
    stopped_by = 0

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal stopped_by
        stopped_by = number
        if number == signal.SIGTERM:  # Ctrl-C has reached the whole process group already
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped_by:  # whatever the code: torchrun leaves with 1 when its ranks have saved and left as asked
        raise PartFailed(part, 128 + stopped_by)
    if code:
        raise PartFailed(part, 128 - code if code < 0 else code)


def merge_settings(settings: PipelineSettings) -> MergeSettings:
    """The settings that ``keye-merge`` gets, checked."""
    out = Path(settings.out)
    return compose.load_settings(
        MergeSettings,
        "merge",
        [
            f"merge={settings.merge_recipe}",
            f"models=[{','.join(str(out / name) for name in settings.merged_runs())}]",
            f"out={out / MERGE}",
            *settings.merge_overrides,
        ],
        compose.recipes_folder(),
    )


def _check_merged_budgets(settings: PipelineSettings) -> None:
    """Raise SettingsError where the merge would refuse its models for their budgets, hours later."""
    merged = settings.merged_runs()
    budgets = {run.name: stage_settings(settings, run).data.resolution for run in settings.runs() if run.name in merged}
    for name, resolution in budgets.items():
        if resolution != budgets[merged[0]]:
            raise SettingsError(
                f"merged: {merged[0]} and {name} train with different budgets, and their average would have neither: "
                "give both the same data.resolution"
            )


def evaluation_settings(settings: PipelineSettings) -> EvaluationSettings:
    """The settings that ``keye-eval`` gets, checked."""
    out = Path(settings.out)
    names = [START, *(run.name for run in settings.runs())] + [MERGE] * bool(settings.merged)
    wanted = EvaluationSettings(
        models=[str(out / name) for name in names],
        data=stage_settings(settings, settings.runs()[-1]).data,
        out=str(out / EVALUATION),
        **vars(settings.evaluation),
    )
    wanted.check()
    return wanted


def _state(settings: PipelineSettings, clock: _Clock) -> dict[str, object]:
    return {
        "name": settings.name,
        "stages": [{"name": stage.name, "stage": stage.stage, "parent": stage.parent} for stage in settings.runs()],
        "merge": {"name": MERGE, "parents": settings.merged_runs(), "recipe": settings.merge_recipe},
        "parts": [{"name": part.name, "seconds": round(part.seconds, 1), "kept": part.kept} for part in clock.parts],
        "commit": runs.commit(),
        "versions": runs.versions(),
    }


class _Clock:
    """Says which part runs and how long the rest will take, going by the token budgets of the stages."""

    def __init__(self, settings: PipelineSettings) -> None:
        self.parts: list[Part] = []
        self._began = 0.0
        work = {}
        for stage in settings.runs():
            wanted = stage_settings(settings, stage)
            work[stage.name] = float(wanted.stage.steps * wanted.stage.global_batch_packs * wanted.stage.max_patches)
        self._left = ["data"] * bool(settings.prepare) + list(work) + [MERGE] * bool(settings.merged) + [EVALUATION]
        self._work = work
        self._number = len(self._left)

    def begin(self, name: str) -> None:
        """Announce a part."""
        self._began = time.monotonic()
        done = [part for part in self.parts if part.work and not part.kept]
        estimate = ""
        if done:
            rate = sum(part.seconds for part in done) / sum(part.work for part in done)
            minutes = rate * sum(self._work.get(left, 0.0) for left in self._left) / 60
            estimate = f"  (about {minutes:.0f} min of training left)" if minutes >= 1 else ""
        print(f"\n[{self._number - len(self._left) + 1}/{self._number}] {name}{estimate}", flush=True)

    def end(self, name: str, kept: bool = False) -> None:
        """Note that the part is done."""
        self._left.remove(name)
        self.parts.append(Part(name, self._work.get(name, 0.0), time.monotonic() - self._began, kept))
        if kept:
            print(f"{name}: already finished, kept", flush=True)

    def table(self, console: Console) -> None:
        """Print the time that each part took."""
        table = Table(title="Time of each part")
        table.add_column("part")
        table.add_column("seconds", justify="right")
        for part in self.parts:
            table.add_row(part.name, "kept" if part.kept else f"{part.seconds:.0f}")
        table.add_row("total", f"{sum(part.seconds for part in self.parts):.0f}")
        console.print(table)
