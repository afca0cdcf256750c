"""Sizes of plain JPEG and PNG files from a few bytes, many times as fast as Pillow opens them.

Only what Pillow reads without surprises is answered: anything else, EXIF and animation included, is left to Pillow. So
the size found here is the one that decoding finds, or decoding refuses the file.
"""

from __future__ import annotations

import struct
import zlib

_FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # start of a frame that Pillow reads
_COMPONENTS = frozenset((1, 3, 4))
_TABLES = frozenset((0xC4, 0xDB, 0xDD, 0xE0, 0xEE, 0xFE))  # Huffman, quantisation, restarts, JFIF, Adobe, comment
_SCAN = 0xDA
_QUANTISATION, _JFIF = 0xDB, 0xE0
_TABLE_BYTES = 65  # of one quantisation table with 8 bits a value
_TABLE_NUMBERS = bytes(range(4))
_SEGMENT = struct.Struct(">BBH")  # 0xFF, marker, length
_FRAME = struct.Struct(">BHHB")  # precision, height, width, components

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour type
_SIMPLE_CHUNKS = frozenset((b"sRGB", b"gAMA", b"pHYs", b"sBIT", b"bKGD"))
_CHUNK_LENGTHS = {b"sRGB": 1, b"gAMA": 4, b"pHYs": 9}  # where Pillow reads the chunk


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a plain JPEG or PNG in pixels; None for everything else."""
    if data[:3] == b"\xff\xd8\xff":
        return _jpeg_size(data)
    return _png_size(data) if data[:8] == _SIGNATURE else None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    place, size, last = 2, None, len(data) - 4
    while place <= last:
        opening, marker, length = _SEGMENT.unpack_from(data, place)
        if opening != 0xFF:
            return None
        if marker == _SCAN:
            return size if length >= 2 else None
        following = place + 2 + length
        if length < 2 or following > last + 4:
            return None
        if marker in _FRAMES:
            if size is not None or length < 8:
                return None
            precision, height, width, components = _FRAME.unpack_from(data, place + 4)
            if precision != 8 or components not in _COMPONENTS or length != 8 + 3 * components or not width * height:
                return None
            size = width, height
        elif marker not in _TABLES or not _plain_segment(data, place, marker, length):
            return None
        place = following
    return None


def _plain_segment(data: bytes, place: int, marker: int, length: int) -> bool:
    if marker == _QUANTISATION:
        tables = data[place + 4 : place + 2 + length : _TABLE_BYTES]
        return (length - 2) % _TABLE_BYTES == 0 and not tables.strip(_TABLE_NUMBERS)
    return marker != _JFIF or (length == 16 and data[place + 4 : place + 9] == b"JFIF\0")


def _png_size(data: bytes) -> tuple[int, int] | None:
    if data[8:16] != b"\0\0\0\rIHDR" or not _sound(data, 8, 13):
        return None
    width, height, depth, colour, compression, filters, interlace = struct.unpack_from(">IIBBBBB", data, 16)
    if depth not in _DEPTHS.get(colour, ()) or compression or filters or interlace > 1 or not width * height:
        return None
    place = 33
    while place + 12 <= len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        if kind == b"IDAT":
            return width, height
        if kind not in _SIMPLE_CHUNKS or _CHUNK_LENGTHS.get(kind, length) != length or not _sound(data, place, length):
            return None
        place += 12 + length
    return None


def _sound(data: bytes, place: int, length: int) -> bool:
    """Whether a chunk is whole and has the checksum of its bytes."""
    end = place + 8 + length
    return zlib.crc32(data[place + 4 : end]).to_bytes(4, "big") == data[end : end + 4]
