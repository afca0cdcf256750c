"""The whole chain as one resumable job: data, start, stages, merge, soups, evaluation, report.

Every part leaves a finished manifest in a folder of its own; a second call starts where the first one stopped. Stages
run as processes of their own (behind ``launcher``, on as many ranks as it starts), so each begins with a clean state
and an interrupt reaches its ranks directly.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

from rich.console import Console

from keye_train import runs
from keye_train.pipeline import plan
from keye_train.pipeline.clock import Clock
from keye_train.pipeline.jobs import Interrupts, PartFailed, call, call_all, launched
from keye_train.settings import PipelineRun, PipelineSettings, TrainSettings

STATE = "pipeline.json"
REPORT = "report.html"
LOGS = "logs"


def run_pipeline(settings: PipelineSettings) -> int:
    """Run every part that is not finished yet.

    Returns:
        0, or the exit code of the part that failed or was interrupted (130 after Ctrl-C).
    """
    # Idle OpenMP threads sleep instead of spinning, here and in every process started below: where ranks and readers
    # share a few cores, spinning halves the speed. Read when torch is imported, so it stands before the first import.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    interrupts = Interrupts()
    clock = _checked(settings, interrupts)
    try:
        with interrupts.remembered():
            results = _run_parts(settings, clock)
    except PartFailed as failure:
        if failure.code in (130, 143):
            print("\nStopped. Run the same command again to go on.", file=sys.stderr)
        else:
            print(f"keye-pipeline: {failure}; mend the cause above and run the same command again", file=sys.stderr)
        return failure.code
    except KeyboardInterrupt:
        print("\nStopped. Run the same command again to go on.", file=sys.stderr)
        return 130
    out = Path(settings.out)
    runs.write_json_atomic(out / STATE, _state(settings, clock))
    from keye_train.report.page import write_report

    page = write_report(out, out / REPORT)
    clock.table(Console())
    print(f"results: {results}\nreport:  {page}")
    return 0


def _checked(settings: PipelineSettings, interrupts: Interrupts) -> Clock:
    """Compose the settings of every part: what cannot work stops here, before any of them has run."""
    work = {run.name: partial(_operations, plan.stage_settings(settings, run)) for run in settings.runs()}
    if settings.merged:
        plan.merge_settings(settings)
        plan.check_merged_budgets(settings)
    if settings.soup is not None:
        plan.soup_settings(settings)
        if settings.soup.curve_points:
            plan.curve_settings(settings)
    plan.evaluation_settings(settings)
    return Clock(plan.part_names(settings), work, interrupts.check)


def _operations(settings: TrainSettings) -> float:
    """Of all steps of a run, by the first batches of its plan."""
    from keye_train.forecast.workload import assumed, workload

    try:
        step = workload(settings, ranks=1)
    except (OSError, ValueError) as error:  # the run itself will say so
        step = assumed(settings, str(error))
    return step.flops * settings.stage.steps


def _run_parts(settings: PipelineSettings, clock: Clock) -> Path:
    """Every part in order; the file of the evaluation's results.

    Model and merging are imported when their part begins: they take seconds, and a fault in the data shows first.
    """
    if settings.prepare:
        clock.begin("data")
        call("data", settings.prepare)
        clock.end("data")
    plan.record_draws(settings)
    _export_start(settings)
    for _, branches in groupby(settings.runs(), key=lambda run: run.entry):
        _run_stages(settings, list(branches), clock)
    if settings.merged:
        from keye_train.merging import merge

        clock.begin(plan.MERGE)
        merge(plan.merge_settings(settings))
        clock.end(plan.MERGE)
    soups = _mix(settings, clock)
    from keye_train.evaluation import evaluate

    clock.begin(plan.EVALUATION)
    results = evaluate(plan.evaluation_settings(settings, soups))
    clock.end(plan.EVALUATION)
    return results


def _mix(settings: PipelineSettings, clock: Clock) -> list[str]:
    """Diagnosis, curve and search, each with what it found; folders of the soups that were accepted."""
    if settings.soup is None:
        return []
    from keye_train.merging.diagnosis import diagnose, is_diagnosed
    from keye_train.report.lines import curve_lines, diagnosis_lines, soup_lines
    from keye_train.soups import draw_curve, search_soup

    if settings.soup.diagnose:
        wanted = plan.diagnosis_settings(settings)
        clock.begin(plan.DIAGNOSIS)
        kept = is_diagnosed(wanted)
        file = diagnose(wanted)
        clock.end(plan.DIAGNOSIS, kept=kept)
        print(diagnosis_lines(runs.read_json(file), file), flush=True)
    if settings.soup.curve_points:
        clock.begin(plan.CURVE)
        file = draw_curve(plan.curve_settings(settings))
        clock.end(plan.CURVE)
        print(curve_lines(runs.read_json(file), file), flush=True)
    clock.begin(plan.SOUP)
    file = search_soup(plan.soup_settings(settings))
    clock.end(plan.SOUP)
    found = runs.read_json(file)
    print(soup_lines(found, file), flush=True)
    return list(found["written"].values())


def _export_start(settings: PipelineSettings) -> None:
    """The untrained model, for the first row of the table."""
    from keye_train.training.export import write_start

    write_start(plan.stage_settings(settings, settings.runs()[-1]), Path(settings.out) / plan.START)


def _run_stages(settings: PipelineSettings, branches: Sequence[PipelineRun], clock: Clock) -> None:
    """Run the branches of one entry (most have one) unless their manifests say that this very recipe has finished."""
    from keye_train.training.manifest import is_finished

    left = {}
    for run in branches:
        if is_finished(plan.stage_settings(settings, run)):
            clock.begin(run.name)
            clock.end(run.name, kept=True)
        else:
            left[run.name] = launched(settings.launcher, run.name, plan.stage_overrides(settings, run))
    if settings.parallel_branches > 1 and len(left) > 1:
        clock.begin(", ".join(left))
        for name, seconds in call_all(left, settings.parallel_branches, Path(settings.out) / LOGS).items():
            clock.end(name, seconds=seconds)
        return
    for name, command in left.items():
        clock.begin(name)
        call(name, command)
        clock.end(name)


def _state(settings: PipelineSettings, clock: Clock) -> dict[str, object]:
    branches = {
        name: {"base": entry.drawn.base, "mixtures": plan.drawn_mixtures(settings, name)}
        for name, entry in settings.stages.items()
        if entry.enabled and entry.drawn.count
    }
    return {
        "name": settings.name,
        "stages": [{"name": run.name, "stage": run.stage, "parent": run.parent} for run in settings.runs()],
        "branches": branches,
        "merge": {"name": plan.MERGE, "parents": settings.merged_runs(), "recipe": settings.merge_recipe},
        "parts": [{"name": part.name, "seconds": round(part.seconds, 1), "kept": part.kept} for part in clock.parts],
        "commit": runs.commit(),
        "versions": runs.versions(),
    }
