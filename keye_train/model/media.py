"""Where the image or video of a message may come from: a path, ``file://``, ``data:``, bytes, a picture, an array.

Nothing is fetched from a network unless the caller says so.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from keye_train.model.images import open_image
from keye_train.sample import SampleError

MAX_DOWNLOAD_BYTES = 2 << 30
DOWNLOAD_TIMEOUT_S = 30.0
_CHANNELS = (1, 3, 4)

ImageSource = str | Path | bytes | Image.Image | np.ndarray | Tensor
VideoSource = str | Path | bytes | np.ndarray | Tensor | Sequence[ImageSource]


def read_image(source: Any, allow_http: bool = False) -> Image.Image:
    """The picture behind an ``ImageSource``, not yet decoded where it is a file.

    Raises:
        SampleError: it cannot be read, is not a picture, or stands on a network and ``allow_http`` is not set.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, (np.ndarray, Tensor)):
        return picture_of(source)
    data = _bytes_or_path(source, allow_http, "image")
    return open_image(data if isinstance(data, bytes) else _read(data))


def read_video(source: Any, allow_http: bool = False) -> bytes | Path | list[Image.Image]:
    """The video behind a ``VideoSource``: an encoded file, or its frames.

    Args:
        source: a file in any form; a list of pictures, each an ``ImageSource``; or an array [frames, height, width,
            channels] or [frames, channels, height, width]. Frames of floats are scaled to 255 where all of them lie
            within [0, 1].
        allow_http: whether ``http://`` and ``https://`` may be fetched.

    Raises:
        SampleError: it cannot be read, or stands on a network and ``allow_http`` is not set.
    """
    if isinstance(source, (np.ndarray, Tensor)):
        if source.ndim != 4:
            raise SampleError(f"video array of shape {tuple(source.shape)}; use [frames, height, width, channels]")
        return _pictures(list(source))
    if isinstance(source, (list, tuple)):
        if not source:
            raise SampleError("video of an empty list of frames")
        arrays = iter(_pictures([frame for frame in source if isinstance(frame, (np.ndarray, Tensor))]))
        return [
            next(arrays) if isinstance(frame, (np.ndarray, Tensor)) else read_image(frame, allow_http)
            for frame in source
        ]
    return _bytes_or_path(source, allow_http, "video")


def picture_of(array: np.ndarray | Tensor) -> Image.Image:
    """An array of pixels as a picture.

    The channels (1, 3 or 4 of them) stand last in [height, width, channels], or first; where both could be meant, an
    array has them last and a torch tensor first. Floats within [0, 1] are scaled to 255.

    Raises:
        SampleError: another shape, or values outside 0 .. 255.
    """
    return _pictures([array])[0]


def _pictures(arrays: Sequence[np.ndarray | Tensor]) -> list[Image.Image]:
    """Arrays that belong together as pictures, with one range for all: a dark frame of a video is not brightened."""
    frames = [_channels_last(array) for array in arrays]
    floats = [frame for frame in frames if np.issubdtype(frame.dtype, np.floating)]
    scale = 255 if all(frame.max() <= 1 for frame in floats) else 1
    return [Image.fromarray(np.ascontiguousarray(_as_uint8(frame, scale))) for frame in frames]


def _channels_last(array: np.ndarray | Tensor) -> np.ndarray:
    """[height, width] or [height, width, channels]; frames of one shape and type are all read alike."""
    first_of_two = isinstance(array, Tensor)
    levels = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
    if levels.ndim == 3:
        last, first = levels.shape[2] in _CHANNELS, levels.shape[0] in _CHANNELS
        if first and (first_of_two or not last):
            levels = np.moveaxis(levels, 0, 2)
        elif not last:
            levels = levels[..., None, None]  # refused below
    if levels.ndim not in (2, 3) or 0 in levels.shape:
        raise SampleError(f"image array of shape {tuple(array.shape)}; use [height, width, channels] with 1, 3 or 4")
    return levels[..., 0] if levels.ndim == 3 and levels.shape[2] == 1 else levels


def _as_uint8(levels: np.ndarray, scale: int) -> np.ndarray:
    """Levels as bytes; floats are multiplied by ``scale`` first."""
    if levels.dtype == np.uint8:
        return levels
    low, high = float(levels.min()), float(levels.max())
    if not (low >= 0 and high <= 255):  # NaN too
        raise SampleError(f"image array with values from {low} to {high}; use 0 .. 255, or floats within [0, 1]")
    if np.issubdtype(levels.dtype, np.floating):
        levels = levels * scale
    return np.rint(levels).astype(np.uint8)


def _bytes_or_path(source: Any, allow_http: bool, kind: str) -> bytes | Path:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, Path):
        return _existing(source, kind)
    if not isinstance(source, str):
        raise SampleError(
            f"{kind} of type {type(source).__name__}; use a path, bytes, a data: URI, pictures or an array"
        )
    scheme = source[:8].partition(":")[0].lower()
    if scheme == "data":
        return _data_uri(source, kind)
    if scheme in ("http", "https"):
        if not allow_http:
            raise SampleError(f"{kind} {source[:80]!r} is on a network; pass allow_http=True to fetch it")
        return _download(source, kind)
    if scheme == "file":
        parts = urllib.parse.urlsplit(source)
        if parts.netloc not in ("", "localhost"):
            raise SampleError(f"{kind} {source[:80]!r} names another machine; use file:///PATH")
        return _existing(Path(urllib.request.url2pathname(parts.path)), kind)
    return _existing(Path(source), kind)


def _existing(path: Path, kind: str) -> Path:
    try:
        if path.is_file():
            return path
    except (OSError, ValueError):  # too long, or a zero byte in it
        pass
    raise SampleError(f"{kind} {str(path)[:200]!r} is not a file")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SampleError(f"{path}: {error.strerror}") from error


def _data_uri(uri: str, kind: str) -> bytes:
    header, comma, body = uri.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise SampleError(f"{kind} {uri[:40]!r}: use data:TYPE;base64,DATA")
    try:
        return base64.b64decode(urllib.parse.unquote(body), validate=True)
    except (binascii.Error, ValueError) as error:
        raise SampleError(f"{kind} {uri[:40]!r} is not base64: {error}") from error


def _download(url: str, kind: str) -> bytes:
    try:
        with _http_opener().open(url, timeout=DOWNLOAD_TIMEOUT_S) as response:
            data = response.read(MAX_DOWNLOAD_BYTES + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise SampleError(f"{kind} {url[:80]!r} cannot be fetched: {error}") from error
    if len(data) > MAX_DOWNLOAD_BYTES:
        raise SampleError(f"{kind} {url[:80]!r} is above {MAX_DOWNLOAD_BYTES} bytes")
    return data


def _http_opener() -> urllib.request.OpenerDirector:
    """Opens http and https and nothing else, so that a redirect to ftp or a file is refused before it is followed."""
    opener = urllib.request.OpenerDirector()
    proxies = {scheme: proxy for scheme, proxy in urllib.request.getproxies().items() if scheme in ("http", "https")}
    for handler in (
        urllib.request.ProxyHandler(proxies),  # with one for ftp it would open that, too
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener
