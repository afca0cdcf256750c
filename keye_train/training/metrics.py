"""The figures of a step: summed on the device while it runs, read once after it, put into the row of metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from keye_train.data.cost import config_cost
from keye_train.data.loader import StepData
from keye_train.model.configuration import keye_config
from keye_train.model.flops import FlopCoefficients
from keye_train.settings import LossWeighting, Objective, TrainSettings
from keye_train.training.counting import Counts, PackItems
from keye_train.training.device import memory_bytes, peak_flops
from keye_train.training.distributed import World
from keye_train.training.engine import Engine, Outcome
from keye_train.training.meter import SOURCE, TASK, LossMeter
from keye_train.training.objectives import TrainingObjective

WEIGHTED_LOSS, GRAD_SQUARE = "weighted_loss", "grad_square/"

Row = dict[str, Any]


class StepMetrics:
    """Measures steps on one rank.

    Args:
        settings: of the run.
        world: all ranks.
        sources: names, in the order of the source numbers.
        objective: names the sums that it gives besides the losses.
    """

    def __init__(
        self, settings: TrainSettings, world: World, sources: tuple[str, ...], objective: TrainingObjective
    ) -> None:
        self._settings, self._stage, self._world, self._sources = settings, settings.stage, world, sources
        self._cost = config_cost(settings)  # operations, also where packs are balanced by measured times
        self._labelled_flops = 0.0  # the contrastive objective's cost has its labels in its tokens
        if self._stage.objective == Objective.language:
            flops = FlopCoefficients.of(keye_config(settings.model)).for_training(self._stage.trainable)
            self._labelled_flops = flops.labelled_token
        self._peak_flops = 0.0
        if world.is_main:
            peak = peak_flops(world.device, settings.deepspeed.precision, settings.logging.peak_tflops)
            self._peak_flops = world.size * peak
        self._weighted = self._stage.loss_weighting != LossWeighting.per_token
        squares = tuple(f"{GRAD_SQUARE}{module}" for module in self._stage.trainable)
        weighted = (WEIGHTED_LOSS,) if self._weighted else ()
        self._meter = LossMeter(sources, (*objective.figures, *weighted, *squares), world.device)

    def begin(self, counts: Counts) -> None:
        """A new step begins."""
        self._meter.reset(counts.tasks)

    def add(self, losses: Tensor, items: PackItems, figures: dict[str, Tensor]) -> None:
        """Add a micro-batch: losses [K] and items as the objective and the counter give them, all on the device."""
        self._meter.add(losses, items.groups, figures)
        if items.weights is not None:
            self._meter.include(WEIGHTED_LOSS, (losses.detach() * items.weights).sum())

    def add_gradient_squares(self, squares: dict[str, Tensor]) -> None:
        """Add the squared gradient norms of the modules, on the device."""
        for module, square in squares.items():
            self._meter.include(f"{GRAD_SQUARE}{module}", square)

    def row(
        self,
        data: StepData,
        counts: Counts,
        rates: dict[str, float],
        outcome: Outcome,
        engine: Engine,
        data_wait_s: float,
        step_s: float,
    ) -> Row:
        """What metrics.jsonl says about a step. Collective: every rank must reach this, once for each logged step."""
        totals = self._meter.totals()
        packs = self._stage.global_batch_packs
        row: Row = {
            "step": data.step + 1,
            **self._losses(totals, counts),
            "loss_by_task": _means(totals, TASK, zip(counts.tasks, counts.items_by_task, strict=True)),
            "lr": rates,
            "grad_norm": finite(outcome.grad_norm),
            "grad_norms": {name: finite(totals[f"{GRAD_SQUARE}{name}"] ** 0.5) for name in self._stage.trainable},
            "applied": outcome.applied,
            "tokens": counts.tokens,
            "labelled_tokens": counts.items,
            "patches": counts.patches,
            "samples": counts.samples,
            "fill": counts.tokens / (packs * self._stage.max_tokens),
            "patch_fill": counts.patches / (packs * self._stage.max_patches),
            "balance": data.balance,
            "tokens_per_s": counts.tokens / step_s,
            "step_s": step_s,
            "world_size": self._world.size,
            "skipped": counts.skipped,
            "changed": counts.changed,
        }
        row |= self._use(counts, data_wait_s, step_s)
        if self._weighted:  # comparable between weightings
            row["token_loss"] = finite(self._by_token(totals) / max(counts.items, 1))
        if self._stage.objective == Objective.contrastive:
            row["pairs"] = row.pop("labelled_tokens")
            row["retrieval_accuracy"] = totals["retrieved"] / max(counts.items, 1)
            if self._stage.caption_weight:
                row["caption_loss"] = totals["caption_loss"] / max(counts.items, 1)
            row["logit_scale"] = math.exp(float(engine.full_parameter("logit_scale")))
        return row

    def losses(self, counts: Counts) -> Row:
        """Only the losses of a row: ``loss`` and ``loss_by_source``. Collective, instead of :meth:`row`."""
        return self._losses(self._meter.totals(), counts)

    def _losses(self, totals: dict[str, float], counts: Counts) -> Row:
        by_source = zip(self._sources, counts.items_by_source, strict=True)
        return {
            "loss": finite(totals.get(WEIGHTED_LOSS, self._by_token(totals)) / (counts.weight or 1)),
            "loss_by_source": _means(totals, SOURCE, by_source),
        }

    def _by_token(self, totals: dict[str, float]) -> float:
        return sum(totals[f"{SOURCE}{name}"] for name in self._sources)

    def flops(self, counts: Counts) -> float:
        """Operations of forward and backward of a global batch, both towers counted; see ``model.flops``."""
        return float(self._cost(counts.sizes)[0]) + self._labelled_flops * counts.items

    def _use(self, counts: Counts, data_wait_s: float, step_s: float) -> Row:
        """How well the machines are used. Collective."""
        wait_us, device_bytes, host_bytes = self._world.max_ints(
            [round(data_wait_s * 1e6), *memory_bytes(self._world.device)]
        )
        flops_per_s = self.flops(counts) / step_s
        return {
            "flops_per_s": flops_per_s,
            "mfu": flops_per_s / self._peak_flops if self._peak_flops else None,
            "data_wait_s": wait_us / 1e6,
            "data_wait_share": wait_us / 1e6 / step_s,
            "device_memory_bytes": device_bytes,
            "host_memory_bytes": host_bytes,
        }


def _means(totals: dict[str, float], prefix: str, counted: Iterable[tuple[str, int]]) -> dict[str, float | None]:
    """Mean loss of each group that has items."""
    return {name: finite(totals[f"{prefix}{name}"] / items) for name, items in counted if items}


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
