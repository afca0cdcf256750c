"""A dated result file: what was run, on what, at which commit, and the figures."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path

from keye_train import runs

FOLDER = Path(__file__).parent / "results"


class Result:
    """Rows of one benchmark."""

    def __init__(self, name: str, about: str) -> None:
        self.name, self.about = name, about.strip()
        self.rows: list[dict[str, object]] = []

    def add(self, row: dict[str, object]) -> None:
        """Add a row and show it."""
        self.rows.append(row)
        print(f"{self.name}: " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    def write(self) -> Path:
        """Write ``results/DATE-NAME.md``."""
        columns = list(self.rows[0])
        table = [columns, ["---"] * len(columns), *([str(row[column]) for column in columns] for row in self.rows)]
        versions = ", ".join(f"{name} {version}" for name, version in runs.versions().items())
        text = "\n".join(
            [
                f"# {self.name}, {time.strftime('%Y-%m-%d')}",
                "",
                self.about,
                "",
                *("| " + " | ".join(line) + " |" for line in table),
                "",
                f"Commit {runs.commit()}; Python {sys.version.split()[0]}, {versions}; {platform.machine()}, "
                f"{os.cpu_count()} processors.",
                "",
            ]
        )
        path = FOLDER / f"{time.strftime('%Y-%m-%d')}-{self.name}.md"
        runs.write_text_atomic(path, text)
        print(f"written: {path}")
        return path
