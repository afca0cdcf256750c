"""Stage 0's pairs: one picture and a caption.

The contrastive loss treats every other caption of a batch as wrong, so most captions combine enough attributes to be
distinct; single digits cannot.
"""

from __future__ import annotations

from typing import Any

from PIL import Image

from data_tools.demo.canvas import COLOURS, INKS, LEAST_CONTRAST, PAPERS, contrast
from data_tools.demo.studio import Draft, Studio
from data_tools.demo.tasks_objects import GRIDS, on_grid, one_digit, place, plural, some_things, two_digits
from data_tools.demo.tasks_words import (
    CAPTIONED,
    CHINESE_WORDS,
    DESCRIBE,
    LATIN_WORDS,
    article,
    render_word,
    two_things_scene,
)

# Words for the rows and columns of a grid of two or three; the middle needs none.
ROWS = {2: ("top", "bottom"), 3: ("top", "", "bottom")}
COLUMNS = {2: ("left", "right"), 3: ("left", "", "right")}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _pair(
    studio: Studio, kind: str, image: Image.Image, caption: str, made_from: dict[str, Any], grey: bool = False
) -> Draft:
    draft = Draft(f"pairs_{kind}", [], caption, "exact", made_from=made_from)
    draft.parts = [studio.photograph(draft, image, grey), studio.pick(DESCRIBE)]
    return draft


def pairs_objects(studio: Studio) -> Draft:
    """One object on a named colour or over a named photograph, or two objects."""
    kind = studio.pick(("paper", "photo", "two"))
    if kind == "two":
        return _pair(studio, "objects", *two_things_scene(studio))
    size = studio.size()
    if kind == "photo":
        thing = studio.thing()
        card = studio.pick(CAPTIONED)
        image, backdrop = studio.backdrop(size, [], file=card.file)
        words = studio.pick(("{} over {}", "{} in front of {}")).format(article(thing.name), card.noun)
    else:
        paper = studio.pick(tuple(PAPERS))
        thing = studio.thing(
            colours=[name for name in COLOURS if contrast(COLOURS[name], PAPERS[paper]) > LEAST_CONTRAST]
        )
        image, backdrop = studio.page(size, paper)
        words = studio.pick(("{} on {}", "{} on a {} ground")).format(article(thing.name), paper)
    drawn = thing.draw(image, place(studio, size, 0.75, 0.9), outline=kind == "photo")
    return _pair(studio, "objects", image, words, {"objects": [drawn], "backdrop": backdrop})


def pairs_places(studio: Studio) -> Draft:
    """One or two objects on a coarse grid and the words for their places, as ``ground`` asks for them in numbers."""
    columns, rows = studio.pick(GRIDS)
    things = studio.two_things() if studio.chance(0.25) else (studio.thing(),)
    image, record, cells = on_grid(studio, things, columns, rows)
    places = [
        " ".join(word for word in (ROWS[rows][cell // columns], COLUMNS[columns][cell % columns]) if word) or "middle"
        for cell in cells
    ]
    words = [f"{article(thing.name)} at the {place}" for thing, place in zip(things, places, strict=True)]
    return _pair(studio, "places", image, " and ".join(words), record)


def pairs_counts(studio: Studio) -> Draft:
    """One to five objects of one shape."""
    image, made_from, name = some_things(studio)
    number = len(made_from["objects"])
    words = article(name) if number == 1 else f"{NUMBERS[number]} {plural(name)}"
    return _pair(studio, "counts", image, words, made_from)


def pairs_digits(studio: Studio) -> Draft:
    """One digit scan, or two side by side.

    The captions leave the colours out: named, they tell most pairs apart, and the digit itself is hardly learned.
    """
    if studio.chance(0.5):
        image, made_from = one_digit(studio, None, studio.pick(INKS), studio.size(longest_aspect=1.5))
        words = studio.pick(("the digit {}", "a handwritten {}"))
    else:
        image, made_from = two_digits(studio, studio.pick(INKS))
        words = studio.pick(("a {} and a {}", "the digits {} and {}"))
    numbers = [NUMBERS[digit["digit"]] for digit in made_from["digits"]]
    return _pair(studio, "digits", image, words.format(*numbers), made_from, grey=True)


def pairs_words(studio: Studio) -> Draft:
    """A rendered word; as with digits, colours are left out of the caption."""
    word = studio.pick(CHINESE_WORDS if studio.chance(0.33) else LATIN_WORDS)
    image, made_from = render_word(studio, word, studio.pick(INKS))
    words = studio.pick(("the word {}", "{} in letters")).format(word)
    draft = _pair(studio, "words", image, words, made_from, grey=True)
    draft.extra["language"] = "zh" if word in CHINESE_WORDS else "en"
    return draft


def pairs_photos(studio: Studio) -> Draft:
    """A photograph with one of its two hand-written captions."""
    card = studio.pick(CAPTIONED)
    image, region = studio.photo_crop(studio.size(), card.file, card.least_share)
    return _pair(studio, "photos", image, studio.pick((card.caption, card.wording)), {"photos": [region]})
