"""What a run tells the outside: metrics.jsonl always, TensorBoard and wandb by recipe, progress on rank 0."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from keye_train import runs
from keye_train.rows import RowFile
from keye_train.settings import LoggingSettings
from keye_train.training.progress import Progress

logger = logging.getLogger(__name__)

Row = dict[str, Any]


class Monitor:
    """Writes one row for each logged step. On ranks other than 0 it does nothing. A full disk stops no run.

    Args:
        run_dir: folder of the run.
        settings: which writers are on.
        is_main: whether this is rank 0.
        first_step: steps done before this launch; rows of later steps (of a launch that died after its last
            checkpoint) are dropped, since those steps are run again.
        steps: steps of the whole run.
        name: of the run, for wandb and the progress bar.
        recipe: resolved recipe, for wandb.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: LoggingSettings,
        is_main: bool,
        first_step: int,
        steps: int,
        name: str,
        recipe: dict[str, Any],
    ) -> None:
        self._jsonl: RowFile | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._progress: Progress | None = None
        if not is_main:
            return
        runs.keep_rows_until(run_dir / runs.METRICS, first_step)
        self._jsonl = RowFile(run_dir / runs.METRICS)
        if settings.tensorboard:
            self._tensorboard = _open_tensorboard(run_dir, first_step)
        if settings.wandb:
            self._wandb = _open_wandb(run_dir, settings.wandb_project, name, recipe)
        if settings.progress:
            self._progress = Progress(name, first_step, steps)

    def write(self, row: Row) -> None:
        """Log one step; ``row["step"]`` counts from 1. Nested values are ``outer/inner`` in TensorBoard and wandb."""
        if self._jsonl is None:
            return
        self._jsonl.write(row)
        scalars = _flatten(row)
        if self._tensorboard is not None:
            try:
                for key, value in scalars.items():
                    self._tensorboard.add_scalar(key, value, row["step"])
            except OSError as error:  # its thread has ended: it takes nothing any more
                logger.warning("no more figures for TensorBoard in this launch (%s); %s has all", error, runs.METRICS)
                self._tensorboard = None
        if self._wandb is not None:
            self._wandb.log(scalars, step=row["step"])

    def advance(self, step: int, row: Row | None) -> None:
        """Move the progress display to ``step`` steps done; ``row`` is the step's row if it was logged."""
        if self._progress is not None:
            self._progress.advance(step, row)

    def close(self) -> None:
        """Flush and close every writer."""
        if self._jsonl is not None:
            self._jsonl.close()
        if self._tensorboard is not None:
            try:
                self._tensorboard.close()
            except OSError as error:
                logger.warning("the last figures for TensorBoard are lost (%s); %s has all", error, runs.METRICS)
        if self._wandb is not None:
            self._wandb.finish()
        if self._progress is not None:
            self._progress.close()


def _open_tensorboard(run_dir: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # heavy: only where it is used

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)


def _open_wandb(run_dir: Path, project: str, name: str, recipe: dict[str, Any]) -> Any:
    """A wandb run that a resumed launch continues; offline where no key is set."""
    import secrets

    import wandb  # heavy: only where it is used

    id_file = run_dir / "wandb_id"
    if not id_file.exists():
        runs.write_text_atomic(id_file, secrets.token_hex(4))
    offline = "WANDB_API_KEY" not in os.environ
    return wandb.init(
        project=project,
        name=name,
        id=id_file.read_text(encoding="utf-8"),
        resume=None if offline else "allow",
        mode="offline" if offline else "online",
        dir=str(run_dir),
        config=recipe,
    )


def _flatten(row: Row, prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}/")
        elif value is not None:
            flat[prefix + key] = value
    return flat
