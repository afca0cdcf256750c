"""The worked example of docs/model.md computes what the page says."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "model.md"


def test_the_worked_example_prints_what_stands_under_it() -> None:
    text = PAGE.read_text(encoding="utf-8")
    example = re.search(r"^```python\n(.*?)^```\n\n^```text\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert example is not None, "docs/model.md has no example followed by its output"
    printed = StringIO()
    with redirect_stdout(printed):
        exec(compile(example[1], str(PAGE), "exec"), {})  # our own page
    assert printed.getvalue() == example[2]
