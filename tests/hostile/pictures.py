"""Encoded pictures of four coloured quadrants, sound and damaged, made without any file.

A picture is 64 x 48 pixels, wider than high, so that its orientation shows in its size and in its colours.
"""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[Any]
Colour = tuple[int, int, int]
Quadrants = tuple[Colour, Colour, Colour, Colour]
"""Colours at the top left, top right, bottom left and bottom right."""

WIDTH, HEIGHT = 64, 48
RED, GREEN, BLUE, SAND = (220, 20, 20), (20, 160, 40), (30, 40, 200), (240, 220, 120)
COLOURS: Quadrants = (RED, GREEN, BLUE, SAND)
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
ORIENTATION = 0x0112
_PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""Of an interlaced PNG: first row, first column, step of the rows, step of the columns."""


def quadrants(values: Any, dtype: type = np.uint8) -> Pixels:
    """The four values, each (C,) or a number, as a picture, (48, 64, C) or (48, 64)."""
    corners: Pixels = np.asarray(values, dtype)
    corners = corners.reshape(2, 2, *corners.shape[1:])
    return corners.repeat(HEIGHT // 2, 0).repeat(WIDTH // 2, 1)


PICTURE = quadrants(COLOURS)
STORED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}
"""How a camera stores an upright picture that it marks with each EXIF orientation."""


def encode(picture: Image.Image | Pixels, format_: str, **options: Any) -> bytes:
    """A file of Pillow's making; lossless where the format can be."""
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(np.ascontiguousarray(picture))
    buffer = io.BytesIO()
    picture.save(buffer, format_, **options)
    return buffer.getvalue()


def jpeg(picture: Image.Image | Pixels = PICTURE, **options: Any) -> bytes:
    """A JPEG whose colours stay within a few units."""
    return encode(picture, "JPEG", quality=95, subsampling=0, **options)


def turned(orientation: int, format_: str, **options: Any) -> bytes:
    """The picture as a camera stores it that was held in one of the eight ways."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encode(STORED[orientation](PICTURE), format_, exif=exif, **options)


def with_exif(body: bytes) -> bytes:
    """A sound JPEG with ``body`` for its EXIF data."""
    return jpeg(exif=b"Exif\0\0" + body)


def animated(format_: str, **options: Any) -> bytes:
    """The picture, then a black frame."""
    first = Image.fromarray(PICTURE)
    black = Image.new("RGB", first.size)
    return encode(first, format_, save_all=True, append_images=[black], duration=100, **options)


def chunk(tag: bytes, body: bytes) -> bytes:
    """A PNG chunk with its length and checksum."""
    return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))


def png_header(width: int, height: int, depth: int, colour: int, interlaced: bool = False) -> bytes:
    """Signature and first chunk; colour 0 is grey, 2 RGB, 4 grey with alpha, 6 RGBA."""
    return b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    )


def png(pixels: Pixels, *, extra: bytes = b"", interlaced: bool = False) -> bytes:
    """A PNG made by hand of uint8 or uint16, (H, W) or (H, W, C), with further chunks before the pixels.

    Pillow writes neither interlaced PNGs nor colours of 16 bits.
    """
    colour = {2: 0, 3: 2}[pixels.ndim]
    passes = _PASSES if interlaced else ((0, 0, 1, 1),)
    rows = (row for y, x, down, right in passes for row in pixels[y::down, x::right])
    body = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in rows)
    header = png_header(pixels.shape[1], pixels.shape[0], 8 * pixels.itemsize, colour, interlaced)
    return header + extra + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def flipped(data: bytes, *places: int) -> bytes:
    """The same with all bits of some bytes flipped; negative places count from the end."""
    damaged = bytearray(data)
    for place in places:
        damaged[place] ^= 0xFF
    return bytes(damaged)


def patched(data: bytes, place: int, new: bytes) -> bytes:
    """The same with some bytes replaced."""
    return data[:place] + new + data[place + len(new) :]


def without_segment(data: bytes, marker: int) -> bytes:
    """A JPEG without its first segment of that marker."""
    start = data.index(bytes([0xFF, marker]))
    return data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]


def inks(colours: Quadrants = COLOURS) -> Image.Image:
    """The picture in CMYK without black ink; in JPEG Pillow stores it inverted with Adobe's marker, as Photoshop."""
    return Image.fromarray(np.dstack([255 - quadrants(colours), np.zeros((HEIGHT, WIDTH), np.uint8)]), "CMYK")


def ycck() -> bytes:
    """A CMYK JPEG whose inks are turned into luminance and colour differences, as Photoshop stores them."""
    # The decoder gives 255 - RGB(Y, Cb, Cr) for the inverted inks, so RGB(Y, Cb, Cr) are the inks.
    differences = Image.fromarray(255 - PICTURE).convert("YCbCr")
    # Pillow inverts what it saves.
    planes = 255 - np.dstack([np.asarray(differences), np.full((HEIGHT, WIDTH), 255, np.uint8)])
    data = jpeg(Image.fromarray(planes, "CMYK"))
    transform = data.index(b"Adobe") + 11
    return patched(data, transform, b"\2")
