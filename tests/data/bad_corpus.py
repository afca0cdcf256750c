"""Real files of every kind of bad or odd input that shards from strangers hold."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image
from toy_shards import Members, chat, clip, picture

READ = ""


@dataclass(frozen=True)
class Kind:
    """One kind of sample: its members, and what the ledger says about it, ``READ`` where it must be read."""

    name: str
    members: Members
    reason: str


class Bomb:
    """Would write a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(mode: str, colour: object, size: tuple[int, int] = (56, 56)) -> Image.Image:
    return Image.new(mode, size, colour)  # type: ignore[arg-type]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width: int = 100_000, height: int = 100_000, text: bytes = b"") -> bytes:
    """A header of any size before a few bytes of pixels, and perhaps a compressed text of any length."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    note = png_chunk(b"zTXt", b"note\0\0" + zlib.compress(text)) if text else b""
    body = png_chunk(b"IDAT", zlib.compress(b"\0" * (3 * 56 + 1) * 56)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + note + body


def tiff_bomb() -> bytes:
    tags = {256: 100_000, 257: 100_000, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 100_000, 279: 8}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + b"\0" * 12


def webp_bomb() -> bytes:
    """An extended header of 16,384 x 16,384 pixels, the most that WebP can say."""
    size = (16_383).to_bytes(3, "little") * 2
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + b"\0" * 4 + size
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_bomb() -> bytes:
    data = bytearray(picture(56, 56))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", 65_500, 65_500)
    return bytes(data)


def video(frames: int, step: Callable[[int], int] = int, rate: int = 8, size: tuple[int, int] = (64, 48)) -> bytes:
    """An mp4 whose frame ``n`` is shown at ``step(n) / rate`` seconds."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.time_base = Fraction(1, rate)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), number * 10 % 256, dtype=np.uint8))
            frame.pts, frame.time_base = step(number), Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def forged(video_file: bytes, box: bytes, offset: int, value: int) -> bytes:
    """A number of a box of an MP4 overwritten: its table of frames then says what is not there."""
    place = video_file.index(box) + 4 + offset
    return video_file[:place] + struct.pack(">I", value) + video_file[place + 4 :]


def audio() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux([*stream.encode(frame), *stream.encode()])
    return file.getvalue()


def pair(name: str, suffix: str, data: bytes, reason: str = READ) -> Kind:
    return Kind(name, {suffix: data, "txt": b"a picture"}, reason)


def film(name: str, data: bytes, reason: str = READ) -> Kind:
    return Kind(name, {"0.mp4": data, "json": chat("What?", "This.", video="0.mp4")}, reason)


def text(name: str, data: bytes, reason: str = READ, suffix: str = "json") -> Kind:
    return Kind(name, {suffix: data}, reason)


def messages(*turns: object) -> bytes:
    return json.dumps({"messages": turns}).encode()


def kinds(folder: Path) -> list[Kind]:
    """All kinds that are samples of a sound tar; ``folder`` is where a pickle would leave its mark."""
    grey = [plain("L", level) for level in (200, 100)]
    turned = Image.new("RGB", (84, 56), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    png, jpeg, webp = (picture(64, 48, kind=kind) for kind in ("PNG", "JPEG", "WEBP"))
    mp4 = clip(64, 48, 8)
    bad_json = "not valid JSON"
    return [
        pair("cmyk", "jpg", saved(plain("CMYK", (0, 255, 255, 0)), "JPEG")),
        pair("deep", "png", saved(plain("I;16", 40_000), "PNG")),
        pair("greyalpha", "png", saved(plain("LA", (10, 0)), "PNG")),
        pair("palette", "png", saved(plain("RGB", "blue").quantize(4), "PNG")),
        pair("gif", "gif", saved(grey[0], "GIF", save_all=True, append_images=grey[1:])),
        pair("animwebp", "webp", saved(grey[0].convert("RGB"), "WEBP", save_all=True, append_images=grey[1:])),
        pair("apng", "png", saved(grey[0], "PNG", save_all=True, append_images=grey[1:])),
        pair("exif", "jpg", saved(turned, "JPEG", exif=exif)),
        pair("wrongending", "jpg", png),
        pair("thin", "png", saved(plain("RGB", "red", (1, 10_000)), "PNG"), "aspect ratio"),
        pair("emptypicture", "jpg", b"", "broken image"),
        pair("cutjpeg", "jpg", jpeg[: len(jpeg) // 2], "broken image"),
        pair("cutpng", "png", png[: len(png) // 2], "broken image"),
        pair("cutwebp", "webp", webp[: len(webp) // 2], "broken image"),
        pair("pngbomb", "png", png_bomb(), "broken image|above the limit"),
        pair("jpegbomb", "jpg", jpeg_bomb(), "broken image|above the limit"),
        pair("tiffbomb", "tif", tiff_bomb(), "broken image|above the limit"),
        pair("webpbomb", "webp", webp_bomb(), "broken image|above the limit"),
        pair("textbomb", "png", png_bomb(56, 56, b"x" * 2**27), "broken image"),
        pair("svg", "png", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>', "none of"),
        pair("html", "jpg", b"<html>404 Not Found</html>", "none of"),
        pair("postscript", "jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/x) run", "none of"),
        pair("float", "tif", saved(plain("F", 0.5), "TIFF"), "floating-point"),
        film("vfr", video(12, lambda number: number * number)),
        film("fps", video(3, rate=60_000)),
        film("long", video(6, lambda number: number * 800)),
        film("nomoov", mp4[: mp4.index(b"moov")], "broken video"),
        film("cutvideo", mp4[: len(mp4) // 3], "broken video"),
        film("endless", forged(mp4, b"stts", 8, 2**31 - 1), "above"),
        film("forgedsizes", forged(mp4, b"stsz", 8, 2**31 - 1), "broken video"),
        film("slow", forged(mp4, b"stts", 12, 2**31 - 1)),
        film("noise", np.random.default_rng(0).bytes(5000), "broken video"),
        film("noframes", video(0), "broken video|without a video"),
        film("audio", audio(), "without a video"),
        film("playlist", b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "broken video"),
        film("concat", b"ffconcat version 1.0\nfile /etc/passwd\n", "broken video"),
        Kind("missing", {"json": chat("q", "a", image="0.jpg")}, "0.jpg"),
        Kind("traversal", {"json": chat("q", "a", image="../../../etc/passwd")}, "etc/passwd"),
        Kind("url", {"json": chat("q", "a", image="file:///etc/passwd")}, "etc/passwd"),
        Kind("extra", {"json": chat("q", "a", image="0.png"), "0.png": png, "1.png": b"unused"}, READ),
        Kind("pickle", {"pkl": pickle.dumps(Bomb(folder / "pwned")), "txt": b"x"}, "unpickled"),
        Kind("torch", {"pth": b"PK\x03\x04", "txt": b"x"}, "unpickled"),
        Kind("script", {"py": b"import pathlib; pathlib.Path('pwned').touch()"}, "no known layout"),
        text("badjson", b'{"messages": [', bad_json),
        text("nested", b"[" * 100_000, bad_json),
        text("number", b'{"text": "x", "n": ' + b"9" * 5000 + b"}", bad_json),
        text("nan", b'{"text": "words", "score": NaN}'),
        text("utf8", b"\xff\xfe", bad_json),
        text("utf8text", b"\xff", "not UTF-8", "txt"),
        text("surrogate", b'{"text": "a \\ud800 b"}', "surrogate|UTF-8"),
        text("nul", b"a\0b", READ, "txt"),
        text("empty", b"", "empty", "txt"),
        text("blank", b" \n\t", "empty", "txt"),
        text("special", b"see <|image_pad|> and <|im_start|>system", READ, "txt"),
        text("noassistant", messages({"role": "user", "content": "q"}), "no assistant"),
        text("role", messages({"role": "wizard", "content": "q"}), "wizard"),
        text("content", messages({"role": "assistant", "content": 7}), "content"),
        text("messages", b'{"messages": {"a": 1}}', "expected a list"),
        text("turn", messages("hello"), "message|turn"),
        text("list", b"[1, 2]", "expected an object"),
        text("task", b'{"text": "x", "task": [1]}', "'task' is list"),
        text("long-text", b"word " * 1000, "over budget", "txt"),
    ]


def write_kinds(path: Path, folder: Path) -> None:
    """A sound tar of all kinds, written past the checks of our own writer."""
    with tarfile.open(path, "w") as tar:
        for kind in kinds(folder):
            for suffix, data in kind.members.items():
                member = tarfile.TarInfo(f"{kind.name}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_hostile_tar(path: Path) -> dict[str, str]:
    """A tar of members that are no plain files; key -> reason."""

    def add(name: str, data: bytes = b"", **fields: object) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        for field, value in fields.items():
            setattr(member, field, value)
        tar.addfile(member, io.BytesIO(data))

    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add("link.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("hard.txt", type=tarfile.LNKTYPE, linkname="good.txt")
        add("device.txt", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        add("fifo.txt", type=tarfile.FIFOTYPE)
        add("sparse.txt", b"x" * 512, pax_headers={"GNU.sparse.map": "0,512", "GNU.sparse.size": "99999999999"})
        add("../up.txt", b"x")
        add("/abs.txt", b"x")
        add("twice.txt", b"x")
        add("twice.txt", b"y")
        add("bare", b"x")
        add("pax.txt", b"read", pax_headers={"comment": "a" * 3000})
        add("good.txt", b"read, too")
    regular = "not a regular file"
    return {
        **dict.fromkeys(("link", "hard", "device", "fifo", "sparse"), regular),
        **dict.fromkeys(("../up.txt", "/abs.txt"), "leaves the archive"),
        "twice": "appears twice",
        "bare": "KEY.ENDING",
        "pax": READ,
        "good": READ,
    }


def write_damaged(folder: Path) -> list[Path]:
    """Shards that are damaged as archives: torn, empty, no tar at all, and with a forged size."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for key in "ab":
            member = tarfile.TarInfo(f"{key}.txt")
            member.size = 300
            tar.addfile(member, io.BytesIO(b"x" * 300))
    data = whole.getvalue()
    forged = bytearray(data)
    forged[124:136] = b"77777777777\0"
    forged[148:156] = b" " * 8
    forged[148:156] = f"{sum(forged[:512]):06o}\0 ".encode()
    contents = {"torn": data[:1700], "zero": b"", "nottar": picture(64, 48), "forged": bytes(forged)}
    for name, content in contents.items():
        (folder / f"{name}.tar").write_bytes(content)
    return [folder / f"{name}.tar" for name in contents]
