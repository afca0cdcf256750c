"""Self-contained HTML pages: no script, no network, every value from data escaped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from keye_train import runs

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text with control characters, marks of writing direction and half surrogates as escapes.

    Captions and keys are strangers': none may steer a terminal or turn the text around it.
    """
    return _CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def write_html(out: Path, template: str, values: dict[str, Any]) -> Path:
    """Render a template of this package, with the style of the reports, to a file that appears whole or not at all.

    Args:
        out: the file.
        template: name in ``data_tools/templates``.
        values: of the template.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("data_tools"), PackageLoader("keye_train.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assert environment.loader is not None
    styles = [environment.loader.get_source(environment, name)[0] for name in ("style.css", "data.css")]
    out.parent.mkdir(parents=True, exist_ok=True)
    runs.write_text_atomic(out, environment.get_template(template).render(style=Markup("".join(styles)), **values))
    return out
