"""Names of tasks, numbered alike on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from keye_train.training.distributed import World

OTHER = "other"
"""Task of samples without a label, and of those whose label came after the first ``MAX_TASKS``."""

MAX_TASKS = 100


class TaskNames:
    """The labels that samples carry. Nobody lists them beforehand, so the ranks agree on new ones where they appear.

    That costs a collective in the few steps that bring a new label, and nothing in all others.
    """

    def __init__(self) -> None:
        self.names = [OTHER]
        self._number = {OTHER: 0, "": 0}

    def numbers(self, tasks: Iterable[str]) -> list[int]:
        """Number of each task, an index into ``names``; 0 where it is not known."""
        return [self._number.get(task, 0) for task in tasks]

    def unknown(self, tasks: Iterable[str]) -> list[str]:
        """Those that have no number yet, each once; none once ``MAX_TASKS`` have one."""
        if len(self.names) > MAX_TASKS:
            return []
        return sorted(set(tasks) - self._number.keys())

    def learn(self, own: Sequence[str], world: World) -> None:
        """Give numbers to new tasks. Collective: every rank must reach this.

        Args:
            own: what is new to this rank.
        """
        found = {task for tasks in world.gather_texts(own[:MAX_TASKS]) for task in tasks}
        for task in sorted(found - self._number.keys())[: MAX_TASKS + 1 - len(self.names)]:
            self._number[task] = len(self.names)
            self.names.append(task)
