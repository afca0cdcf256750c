"""Questions about drawn objects and digit scans: shape, digit, count, ground, compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from data_tools.demo.canvas import INKS, Box, draw_scan, shade
from data_tools.demo.studio import Draft, Studio, Thing
from keye_train.model.markup import format_boxes, format_points, format_reference, to_grid

COUNT_MAX = 5
CELL = 28  # pixels; grounding and counting place objects on a grid whose cells are language tokens
GRIDS = ((2, 2), (3, 2), (2, 3), (3, 3))  # grounding: columns, rows


def place(studio: Studio, size: tuple[int, int], low: float, high: float) -> Box:
    """A square box inside a canvas; its side is ``low`` to ``high`` times the shorter side."""
    side = round(min(size) * studio.rng.uniform(low, high))
    left = int(studio.rng.integers(size[0] - side + 1))
    top = int(studio.rng.integers(size[1] - side + 1))
    return left, top, left + side, top + side


def one_thing(studio: Studio, thing: Thing, size: tuple[int, int]) -> tuple[Image.Image, dict[str, Any]]:
    """A large object on a backdrop, and the record of both."""
    image, backdrop = studio.backdrop(size, [thing.rgb])
    drawn = thing.draw(image, place(studio, size, 0.8, 1.0), outline="photo" in backdrop)
    return image, {"objects": [drawn], "backdrop": backdrop}


def one_digit(studio: Studio, digit: int | None, ink: str, size: tuple[int, int]) -> tuple[Image.Image, dict[str, Any]]:
    """A scan of a digit (None: of any) that nearly fills the shorter side of a canvas, and its record."""
    index, scan, label = studio.scan(digit)
    image, backdrop = studio.page(size)
    box = place(studio, size, 0.95, 1.0)
    draw_scan(image, scan, shade(ink, studio.rng), box, angle=float(studio.rng.uniform(-5, 5)))
    record = {"scan": index, "digit": label, "ink": ink, "box": list(box)}
    return image, {"digits": [record], "backdrop": backdrop}


def two_digits(studio: Studio, ink: str) -> tuple[Image.Image, dict[str, Any]]:
    """Two digit scans side by side on one page, and their record."""
    side = 2 * CELL
    image, backdrop = studio.page((2 * side, side))
    records = []
    for left in (0, side):
        index, scan, label = studio.scan()
        box = (left + 1, 1, left + side - 1, side - 1)
        draw_scan(image, scan, shade(ink, studio.rng), box, angle=float(studio.rng.uniform(-5, 5)))
        records.append({"scan": index, "digit": label, "ink": ink, "box": list(box)})
    return image, {"digits": records, "backdrop": backdrop}


def shape(studio: Studio) -> Draft:
    """Colour and shape of one object."""
    thing = studio.thing()
    image, made_from = one_thing(studio, thing, studio.size())
    draft = Draft("shape", [], thing.name, "exact", made_from=made_from)
    draft.parts = [studio.photograph(draft, image), studio.pick(("What is shown?", "Colour and shape?"))]
    return draft


def digit(studio: Studio) -> Draft:
    """One handwritten digit."""
    image, made_from = one_digit(studio, None, studio.pick(INKS), studio.size(longest_aspect=1.5))
    draft = Draft("digit", [], str(made_from["digits"][0]["digit"]), "exact", made_from=made_from)
    draft.parts = [studio.photograph(draft, image, grey=True), studio.pick(("Which digit?", "Read the digit."))]
    return draft


def some_things(studio: Studio) -> tuple[Image.Image, dict[str, Any], str]:
    """One to five objects of one shape, alike or of several colours, on a 3 x 3 grid.

    Returns:
        The picture, its record, and a name that fits each of them, e.g. ``red circle`` or ``circle``.
    """
    number = int(studio.rng.integers(1, COUNT_MAX + 1))
    kind = studio.thing()
    mixed = studio.chance(0.2)
    things = [studio.thing(shapes=(kind.shape,)) if mixed else kind for _ in range(number)]
    size = (3 * CELL, 3 * CELL)
    image, backdrop = studio.backdrop(size, [thing.rgb for thing in things], photo_share=0.1)
    drawn = []
    for thing, cell in zip(things, studio.rng.permutation(9)[:number].tolist(), strict=True):
        margin = int(studio.rng.integers(1, 5))
        left, top = cell % 3 * CELL, cell // 3 * CELL
        box = (left + margin, top + margin, left + CELL - margin, top + CELL - margin)
        drawn.append(thing.draw(image, box, outline=mixed or "photo" in backdrop))
    return image, {"objects": drawn, "backdrop": backdrop}, kind.shape if mixed else kind.name


def plural(noun: str) -> str:
    """More than one of a shape."""
    return noun + ("es" if noun.endswith("cross") else "s")


def count(studio: Studio) -> Draft:
    """How many objects there are."""
    image, made_from, _ = some_things(studio)
    draft = Draft("count", [], str(len(made_from["objects"])), "exact", made_from=made_from)
    draft.parts = [studio.photograph(draft, image), f"How many {plural(made_from['objects'][0]['shape'])}?"]
    return draft


def on_grid(
    studio: Studio, things: Sequence[Thing], columns: int, rows: int
) -> tuple[Image.Image, dict[str, Any], list[int]]:
    """Things in different cells of a coarse grid, so that few places occur.

    Returns:
        The picture, its record, and the cell of each thing, counted along the rows.
    """
    size = (columns * CELL, rows * CELL)
    cells = studio.rng.permutation(columns * rows)[: len(things)].tolist()
    image, backdrop = studio.backdrop(size, [thing.rgb for thing in things])
    drawn = []
    for thing, cell in zip(things, cells, strict=True):
        left, top = cell % columns * CELL, cell // columns * CELL
        drawn.append(thing.draw(image, (left, top, left + CELL, top + CELL), outline="photo" in backdrop))
    return image, {"objects": drawn, "backdrop": backdrop, "size": list(size)}, cells


def ground(studio: Studio) -> Draft:
    """Where an object is, as a box or a point; a quarter of the pictures hold a second object."""
    columns, rows = studio.pick(GRIDS)
    things = studio.two_things() if studio.chance(0.25) else (studio.thing(),)
    image, record, _ = on_grid(studio, things, columns, rows)
    x0, y0, x1, y1 = box = to_grid(record["objects"][0]["box"], *image.size)
    target = format_reference(things[0].name)
    if studio.chance(0.6):
        question, metric = f"Locate the {target}.", "box_iou"
        answer = format_boxes([box])
    else:
        question, metric = f"Point to the {target}.", "point"
        answer = format_points([((x0 + x1) / 2, (y0 + y1) / 2)])
    draft = Draft("ground", [], answer, metric, made_from=record)
    draft.extra["box"] = box
    draft.parts = [studio.photograph(draft, image), question]
    return draft


def compare(studio: Studio) -> Draft:
    """Two pictures in one conversation: which one shows a thing, what one of them shows, or whether they agree."""
    kind = studio.rng.choice(["which", "name", "same_colour", "same_digit"], p=[0.35, 0.35, 0.15, 0.15])
    draft = Draft("compare", [], "", "exact", made_from={"kind": str(kind)})
    if kind == "same_digit":
        _compare_digits(studio, draft)
        return draft
    first, second = studio.two_things()
    if kind == "same_colour" and studio.chance(0.5):
        second = studio.thing(colours=(first.colour,))
    shots = [one_thing(studio, thing, studio.size(longest_aspect=1.4)) for thing in (first, second)]
    pictures = [studio.photograph(draft, image) for image, _ in shots]
    draft.made_from["pictures"] = [record for _, record in shots]
    position = int(studio.rng.integers(2))
    if kind == "same_colour":
        question, draft.answer = "Same colour?", "yes" if first.colour == second.colour else "no"
    elif kind == "which":
        question, draft.answer = f"Which has the {(first, second)[position].name}?", ("first", "second")[position]
    else:
        question, draft.answer = f"What does the {('first', 'second')[position]} show?", (first, second)[position].name
    draft.parts = [*pictures, question]
    return draft


def _compare_digits(studio: Studio, draft: Draft) -> None:
    left = int(studio.rng.integers(10))
    right = left if studio.chance(0.5) else int((left + studio.rng.integers(1, 10)) % 10)
    shots = [one_digit(studio, label, studio.pick(INKS), (56, 56)) for label in (left, right)]
    draft.made_from["pictures"] = [record for _, record in shots]
    draft.parts = [*(studio.photograph(draft, image, grey=True) for image, _ in shots), "Same digit?"]
    draft.answer = "yes" if left == right else "no"
