"""Which part runs, how long each took, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass
class Part:
    """One finished or running part."""

    name: str
    trains: bool
    seconds: float = 0.0
    kept: bool = False  # finished by an earlier call


class Clock:
    """Announces parts and estimates the time left by the operations of the stages."""

    def __init__(
        self, parts: Sequence[str], work: Mapping[str, Callable[[], float]], check: Callable[[], None] = lambda: None
    ) -> None:
        """Args:
        parts: names, in the order in which they run.
        work: operations of those that train; asked for when a part that trains has ended.
        check: called before each part; raises where none is to begin.
        """
        self.parts: list[Part] = []
        self._left, self._work, self._number = list(parts), dict(work), len(parts)
        self._known: dict[str, float] = {}
        self._check = check
        self._began = 0.0

    def begin(self, name: str) -> None:
        """Announce a part."""
        self._began = time.monotonic()
        done = [part for part in self.parts if part.trains and not part.kept]
        estimate = ""
        if done:
            rate = sum(part.seconds for part in done) / sum(self._operations(part.name) for part in done)
            minutes = rate * sum(self._operations(left) for left in self._left if left in self._work) / 60
            estimate = f"  (about {minutes:.0f} min of training left)" if minutes >= 1 else ""
        self._check()
        print(f"\n[{self._number - len(self._left) + 1}/{self._number}] {name}{estimate}", flush=True)

    def _operations(self, name: str) -> float:
        if name not in self._known:
            self._known[name] = self._work[name]()
        return self._known[name]

    def end(self, name: str, kept: bool = False, seconds: float | None = None) -> None:
        """Note that the part is done.

        Args:
            kept: an earlier call had finished it.
            seconds: how long it took; None: since it was announced.
        """
        self._left.remove(name)
        took = time.monotonic() - self._began if seconds is None else seconds
        self.parts.append(Part(name, name in self._work, took, kept))
        if kept:
            print(f"{name}: already finished, kept", flush=True)

    def table(self, console: Console) -> None:
        """Print the time that each part took."""
        table = Table(title="Time of each part")
        table.add_column("part")
        table.add_column("seconds", justify="right")
        for part in self.parts:
            table.add_row(part.name, "kept" if part.kept else _seconds(part.seconds))
        table.add_row("total", _seconds(sum(part.seconds for part in self.parts)))
        console.print(table)


def _seconds(value: float) -> str:
    """Whole ones, of short parts with a decimal: 0 would look like a part that did nothing."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
