"""Self-contained HTML pages: no script, no network, every value escaped. All pages share base.html and style.css."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from keye_train import runs


def write_page(
    out: Path,
    template: str,
    values: Mapping[str, Any],
    packages: Sequence[str] = (),
    styles: Sequence[str] = ("style.css",),
) -> Path:
    """Render a template to a file that appears whole or not at all.

    Args:
        out: the file.
        template: name in the folder ``templates`` of this package or of ``packages``; it extends base.html.
        values: of the template. ``title`` has to be there; ``about`` and ``tiles`` may.
        packages: where templates and styles are looked for first.
        styles: style sheets, in this order.

    Returns:
        ``out``.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in (*packages, "keye_train.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assert environment.loader is not None
    sheets = [environment.loader.get_source(environment, name)[0] for name in styles]
    fixed = {"style": Markup("".join(sheets)), "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
    page = environment.get_template(template).render({"about": "", "tiles": [], **fixed, **values})
    runs.write_text_atomic(out, page)
    return out
