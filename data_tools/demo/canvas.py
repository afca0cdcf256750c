"""Drawing and encoding: colours, shapes, digit scans and words on a canvas, and the canvas as JPEG or PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_tools.demo.assets import SCAN_LEVELS

RGB = tuple[int, int, int]
Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels; x1 and y1 are outside

COLOURS: dict[str, RGB] = {
    "red": (214, 38, 38),
    "green": (40, 160, 60),
    "blue": (45, 85, 220),
    "yellow": (242, 220, 50),
    "orange": (242, 130, 25),
    "purple": (140, 55, 170),
    "white": (246, 246, 246),
    "black": (22, 22, 22),
}
# Strokes are dark on light paper, as in books. With ink and paper of any colour, a small vision tower spends all of a
# short training on learning that both kinds of stroke are one.
INKS = ("red", "green", "blue", "purple", "black")
PAPERS: dict[str, RGB] = {
    "white": (246, 246, 246),
    "yellow": (242, 220, 50),
    "grey": (205, 205, 208),
    "beige": (226, 206, 170),
    "pink": (250, 190, 200),
    "cyan": (150, 215, 230),
}
SHAPES = ("circle", "square", "triangle", "cross")
OVERSAMPLING = 4  # shapes are drawn this much larger, then scaled down, for smooth edges
LEAST_CONTRAST = 110.0  # distance of two colours in RGB space below which they are hard to tell apart
EXIF_ORIENTATION = 0x0112
# Orientation tag -> turn that a writer applies so that a reader who obeys the tag sees the picture upright.
EXIF_TURNS = {
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}


def shade(name: str, rng: np.random.Generator, spread: int = 14) -> RGB:
    """The named colour of COLOURS or PAPERS, each channel moved by at most ``spread``."""
    levels = COLOURS[name] if name in COLOURS else PAPERS[name]
    red, green, blue = (int(np.clip(level + rng.integers(-spread, spread + 1), 0, 255)) for level in levels)
    return red, green, blue


def contrast(first: Sequence[int], second: Sequence[int]) -> float:
    """Euclidean distance of two colours in RGB space, 0 to 442."""
    return float(np.linalg.norm(np.subtract(first, second)))


def luminance(colour: Sequence[int]) -> float:
    """Brightness 0 to 255 (Rec. 601 weights)."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def draw_shape(image: Image.Image, shape: str, colour: RGB, box: Box, outline: bool) -> None:
    """Draw a shape that touches all four sides of ``box``; ``outline`` adds a thin rim for busy backgrounds."""
    width, height = box[2] - box[0], box[3] - box[1]
    if outline:
        image.paste(
            (20, 20, 20) if luminance(colour) > 110 else (240, 240, 240), box, _shape_mask(shape, width, height)
        )
        rim = max(1, round(min(width, height) * 0.05))
        box = (box[0] + rim, box[1] + rim, box[2] - rim, box[3] - rim)
        width, height = box[2] - box[0], box[3] - box[1]
    image.paste(colour, box, _shape_mask(shape, width, height))


def _shape_mask(shape: str, width: int, height: int) -> Image.Image:
    wide, high = width * OVERSAMPLING, height * OVERSAMPLING
    mask = Image.new("L", (wide, high), 0)
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((0, 0, wide - 1, high - 1), fill=255)
    elif shape == "square":
        draw.rectangle((0, 0, wide, high), fill=255)
    elif shape == "triangle":
        draw.polygon(((wide // 2, 0), (wide - 1, high - 1), (0, high - 1)), fill=255)
    elif shape == "cross":
        draw.rectangle((wide * 0.34, 0, wide * 0.66, high), fill=255)
        draw.rectangle((0, high * 0.34, wide, high * 0.66), fill=255)
    else:
        raise ValueError(f"unknown shape '{shape}': use one of {SHAPES}")
    return mask.resize((width, height), Image.Resampling.BOX)


def draw_scan(image: Image.Image, scan: np.ndarray, ink: RGB, box: Box, angle: float) -> None:
    """Draw an 8 x 8 digit scan (levels 0 to 16) in ``ink``, scaled to ``box`` and turned by ``angle`` degrees."""
    mask = Image.fromarray((scan.astype(np.uint16) * 255 // SCAN_LEVELS).astype(np.uint8), "L")
    mask = mask.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BICUBIC)
    if angle:
        mask = mask.rotate(angle, Image.Resampling.BILINEAR)
    image.paste(ink, box, mask)


def word_size(word: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    """Width and height in pixels of the ink of a word."""
    left, top, right, bottom = font.getbbox(word)
    return round(right - left), round(bottom - top)


def draw_word(image: Image.Image, word: str, font: ImageFont.FreeTypeFont, ink: RGB, corner: tuple[int, int]) -> None:
    """Draw a word whose ink starts at ``corner``."""
    left, top, _, _ = font.getbbox(word)
    ImageDraw.Draw(image).text((corner[0] - left, corner[1] - top), word, font=font, fill=ink)


def encode_image(image: Image.Image, rng: np.random.Generator, grey: bool = False) -> tuple[str, bytes]:
    """File suffix and bytes: JPEG or PNG, at times turned with an EXIF tag, with an alpha channel, or grey.

    ``grey`` allows a picture without colour, for questions that do not ask about colours. Where the alpha channel
    hides a pixel, that pixel is white: a reader that drops alpha and one that paints on white see the same.
    """
    if grey and rng.random() < 0.1:
        image = image.convert("L")
    out = io.BytesIO()
    kind = rng.random()
    if kind < 0.12:
        if image.mode == "RGB" and rng.random() < 0.3:
            image = _with_alpha(image)
        image.save(out, "PNG", compress_level=6)
        return "png", out.getvalue()
    options = {}
    if kind > 0.96:
        tag = int(rng.choice(list(EXIF_TURNS)))
        image = image.transpose(EXIF_TURNS[tag])
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = tag
        options["exif"] = exif
    image.save(out, "JPEG", quality=int(rng.integers(70, 88)), optimize=True, **options)
    return "jpg", out.getvalue()


def _with_alpha(image: Image.Image) -> Image.Image:
    white = np.all(np.asarray(image) == 255, axis=2)
    alpha = Image.fromarray(np.where(white, 0, 255).astype(np.uint8), "L")
    image = image.copy()
    image.putalpha(alpha)
    return image
