"""Sums of one optimizer step: counted on the host before it, added up on the device during it, read once after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

SOURCE, TASK = "loss/", "task_loss/"


class LossMeter:
    """Loss by source and by task, and further figures, of one step.

    Nothing here waits for the device until :meth:`totals`.

    Args:
        sources: names, in the order of the source numbers.
        figures: names of further sums.
        device: of the losses.
    """

    def __init__(self, sources: Sequence[str], figures: Sequence[str], device: torch.device) -> None:
        self._names = [f"{SOURCE}{source}" for source in sources] + list(figures)
        self._tasks: Sequence[str] = ()
        self._place = {name: place for place, name in enumerate(self._names)}
        self._sources = len(sources)
        self._device = device
        self.reset(())

    def reset(self, tasks: Sequence[str]) -> None:
        """Forget everything: a new step begins.

        Args:
            tasks: names, in the order of the task numbers; the same on every rank.
        """
        self._tasks = tasks
        self._sums = torch.zeros(len(self._names) + len(tasks), dtype=torch.float64, device=self._device)

    def add(self, losses: Tensor, groups: Tensor, figures: dict[str, Tensor]) -> None:
        """Add one micro-batch.

        Args:
            losses: [K] float32, on the device.
            groups: [2, K] int64 source and task number of each, on the device.
            figures: scalar sums, on the device.
        """
        values = losses.detach().double()
        self._sums[: self._sources].index_add_(0, groups[0], values)
        self._sums[len(self._names) :].index_add_(0, groups[1], values)
        for name, value in figures.items():
            self.include(name, value)

    def include(self, figure: str, value: Tensor) -> None:
        """Add a scalar, on the device, to one of the further sums."""
        self._sums[self._place[figure]] += value

    def totals(self) -> dict[str, float]:
        """Sums over all ranks. Collective: every rank must reach this. Waits for the device."""
        dist.all_reduce(self._sums)
        names = [*self._names, *(f"{TASK}{task}" for task in self._tasks)]
        return dict(zip(names, self._sums.tolist(), strict=True))
