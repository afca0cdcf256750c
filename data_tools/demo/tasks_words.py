"""Questions about words: rendered words (Latin and Chinese), captions, and pure text."""

from __future__ import annotations

import zlib
from typing import Any

from PIL import Image

from data_tools.demo.assets import CHINESE_FONTS, LATIN_FONTS, load_font
from data_tools.demo.canvas import INKS, draw_word, shade, word_size
from data_tools.demo.captions import PHOTOS
from data_tools.demo.studio import Draft, Studio
from data_tools.demo.tasks_objects import place

LATIN_WORDS = (
    "river", "stone", "apple", "cloud", "bread", "chair", "house", "table", "music", "light", "water", "tiger",
    "lemon", "paper", "plant", "train", "night", "ocean", "spoon", "glass", "storm", "wheel", "bird", "fish",
)  # fmt: skip
CHINESE_WORDS = ("你好", "中国", "学校", "大海", "朋友", "月亮", "太阳", "春天", "老师", "花园", "火车", "苹果")
CAPTIONED = tuple(card for card in PHOTOS if card.caption)
RELATIONS = ("left of", "right of", "above", "below")
DESCRIBE = ("Describe the picture.", "Write a caption.")

OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("left", "right"), ("day", "night"), ("old", "new"),
    ("fast", "slow"), ("high", "low"), ("open", "closed"), ("wet", "dry"), ("light", "dark"), ("long", "short"),
    ("full", "empty"), ("hard", "soft"), ("yes", "no"), ("first", "last"),
)  # fmt: skip
FACTS = (
    ("a cat", "has", "four legs"), ("a bird", "has", "two legs"), ("a spider", "has", "eight legs"),
    ("grass", "is", "green"), ("snow", "is", "white"), ("coal", "is", "black"), ("blood", "is", "red"),
    ("a lemon", "is", "yellow"), ("a horse", "eats", "grass"), ("a cow", "gives", "milk"), ("a hen", "lays", "eggs"),
    ("a bee", "makes", "honey"), ("a baker", "makes", "bread"), ("the sun", "is", "hot"), ("ice", "is", "cold"),
)  # fmt: skip
WEEK = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def render_word(studio: Studio, word: str, ink: str) -> tuple[Image.Image, dict[str, Any]]:
    """One word in a random font and size on a canvas with little room around it, and its record."""
    chinese = word in CHINESE_WORDS
    font_name = studio.pick(CHINESE_FONTS if chinese else LATIN_FONTS)
    pixels = int(studio.rng.integers(34, 45) if chinese else studio.rng.integers(28, 40))
    weight = studio.pick((400, 600, 800))
    font = load_font(font_name, pixels, weight)
    wide, high = word_size(word, font)
    size = (wide + int(studio.rng.integers(6, 17)), max(high + int(studio.rng.integers(6, 17)), 42))
    image, backdrop = studio.page(size)
    corner = (int(studio.rng.integers(2, size[0] - wide - 1)), int(studio.rng.integers(2, size[1] - high - 1)))
    draw_word(image, word, font, shade(ink, studio.rng), corner)
    record = {"word": word, "ink": ink, "font": font_name.split(":")[1], "pixels": pixels, "weight": weight}
    return image, {"words": [record], "backdrop": backdrop}


def ocr(studio: Studio) -> Draft:
    """One rendered word of a closed list; a third of them are Chinese."""
    word = studio.pick(CHINESE_WORDS if studio.chance(0.33) else LATIN_WORDS)
    image, made_from = render_word(studio, word, studio.pick(INKS))
    draft = Draft("ocr", [], word, "exact", made_from=made_from)
    draft.extra["language"] = "zh" if word in CHINESE_WORDS else "en"
    draft.parts = [studio.photograph(draft, image, grey=True), studio.pick(("Read the word.", "What is written?"))]
    return draft


def two_things_scene(studio: Studio) -> tuple[Image.Image, str, dict[str, Any]]:
    """Two objects beside or above each other: the picture, its description and its record."""
    first, second = studio.two_things()
    relation = studio.pick(RELATIONS)
    side = int(studio.rng.integers(42, 57))
    beside = relation in ("left of", "right of")
    size = (2 * side, side) if beside else (side, 2 * side)
    image, backdrop = studio.backdrop(size, [first.rgb, second.rgb], photo_share=0.3)
    order = (first, second) if relation in ("left of", "above") else (second, first)
    drawn = {}
    for position, thing in enumerate(order):
        left, top = (position * side, 0) if beside else (0, position * side)
        box = place(studio, (side, side), 0.8, 1.0)
        box = (box[0] + left, box[1] + top, box[2] + left, box[3] + top)
        drawn[thing.name] = thing.draw(image, box, outline="photo" in backdrop)
    text = f"{article(first.name)} {relation} {article(second.name)}"
    objects = [drawn[first.name], drawn[second.name]]
    return image, text, {"objects": objects, "relation": relation, "backdrop": backdrop}


def article(noun: str) -> str:
    """``noun`` with its indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def caption(studio: Studio) -> Draft:
    """A photograph with its hand-written caption, or a composed scene with its description."""
    if studio.chance(0.6):
        card = studio.pick(CAPTIONED)
        image, region = studio.photo_crop(studio.size(), card.file, card.least_share)
        draft = Draft("caption", [], card.caption, "token_f1", made_from={"photos": [region]})
    else:
        image, text, made_from = two_things_scene(studio)
        draft = Draft("caption", [], text, "exact", made_from=made_from)
    draft.parts = [studio.photograph(draft, image), studio.pick(DESCRIBE)]
    return draft


def text(studio: Studio) -> Draft:
    """A short question without a picture. Each question belongs to one split: a fifth of them are held out."""
    while True:
        kind = studio.pick((_add, _next_number, _larger, _opposite, _fact, _weekday, _spell))
        question, answer = kind(studio)
        heldout = zlib.crc32(question.encode()) % 5 == 0
        if heldout == (studio.split == "heldout"):
            return Draft("text", [question], answer, "exact", made_from={"kind": kind.__name__[1:]})


def _add(studio: Studio) -> tuple[str, str]:
    first, second = (int(number) for number in studio.rng.integers(0, 10, 2))
    return f"{first} + {second} =", str(first + second)


def _next_number(studio: Studio) -> tuple[str, str]:
    number = int(studio.rng.integers(0, 99))
    return f"What comes after {number}?", str(number + 1)


def _larger(studio: Studio) -> tuple[str, str]:
    first, second = (int(number) for number in studio.rng.choice(100, 2, replace=False))
    return f"Which is larger, {first} or {second}?", str(max(first, second))


def _opposite(studio: Studio) -> tuple[str, str]:
    word, other = studio.pick(OPPOSITES)
    if studio.chance(0.5):
        word, other = other, word
    forms = ("Opposite of {}?", "What is the opposite of {}?", "Not {}, but?", "Give the opposite: {}")
    return studio.pick(forms).format(word), other


def _fact(studio: Studio) -> tuple[str, str]:
    subject, verb, answer = studio.pick(FACTS)
    forms = ("Complete: {} {}", "{} {} what?", "Fill in: {} {} ...", "Tell me: {} {} ...")
    return studio.pick(forms).format(subject, verb), answer


def _weekday(studio: Studio) -> tuple[str, str]:
    day = int(studio.rng.integers(7))
    forms = ("Which day comes after {}?", "The day after {}?", "Next day: {}", "{} is followed by?")
    return studio.pick(forms).format(WEEK[day]), WEEK[(day + 1) % 7]


def _spell(studio: Studio) -> tuple[str, str]:
    word = studio.pick((*LATIN_WORDS, *CHINESE_WORDS))
    forms = ("Repeat: {}", "Say the word {}", "Write {}", "Copy: {}")
    return studio.pick(forms).format(word), word
