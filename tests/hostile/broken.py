"""Files of the corpus that hold no usable picture: (group, name, content, what the reason must match)."""

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from tests.hostile.pictures import (
    PICTURE,
    chunk,
    encode,
    flipped,
    inks,
    jpeg,
    patched,
    png,
    png_header,
)

File = tuple[str, str, bytes, str]
NO_IMAGE, TRUNCATED = "^the file is not an image that can be read$", "^the image data is truncated$"
CORRUPT = r"^the image data is corrupt \(.+\)$"
DAMAGED = f"{TRUNCATED}|{CORRUPT}"
TOO_LARGE = "^the image has more than [0-9]+ pixels"
NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def bomb() -> bytes:
    """A PNG of 65 bytes that says it has 2.5 billion pixels."""
    return png_header(50000, 50000, 8, 2) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_damaged_below() -> bytes:
    """A JPEG with a flipped byte behind the middle of its pixels."""
    data = jpeg()
    start = data.index(b"\xff\xda")
    return flipped(data, start + (len(data) - start) * 4 // 5)


def refused() -> Iterator[File]:
    """Everything that must become a reject."""
    yield "empty", "empty.png", b"", "^the file is empty$"
    yield "empty", "empty.jpg", b"", "^the file is empty$"
    yield from _truncated()
    yield from _corrupt()
    yield from _no_images()
    yield from _bombs()
    yield "no range", "float.tif", encode(Image.new("F", (64, 48), 0.5), "TIFF"), "floating-point"
    yield "no range", "int32.tif", encode(Image.new("I", (64, 48), 1 << 20), "TIFF"), "32-bit"
    yield "no range", "negative.tif", encode(Image.new("I", (64, 48), -1), "TIFF"), "32-bit"


def _truncated() -> Iterator[File]:
    files = {
        "png": png(NOISE),
        "jpg": jpeg(NOISE),
        "gif": encode(NOISE, "GIF"),
        "webp": encode(NOISE, "WEBP", lossless=True),
        "tif": encode(NOISE, "TIFF"),
        "bmp": encode(NOISE, "BMP"),
        "ico": encode(NOISE[:, 8:56], "ICO", sizes=[(48, 48)]),
    }
    for kind, data in files.items():
        yield "truncated", f"truncated.{kind}", data[: len(data) * 3 // 5], DAMAGED
    yield "truncated", "truncated-interlaced.png", png(NOISE, interlaced=True)[:5000], DAMAGED
    yield "truncated", "truncated-progressive.jpg", jpeg(NOISE, progressive=True)[:4000], DAMAGED
    yield "truncated", "signature.png", png(NOISE)[:8], f"{NO_IMAGE}|{DAMAGED}"
    yield "truncated", "start.jpg", jpeg(NOISE)[:3], f"{NO_IMAGE}|{DAMAGED}"
    yield "truncated", "no-pixels.png", png_header(64, 48, 8, 2) + chunk(b"IEND", b""), DAMAGED


def _corrupt() -> Iterator[File]:
    picture, noise = png(PICTURE), png(NOISE)
    yield "corrupt header", "flipped-signature.png", flipped(picture, 1), NO_IMAGE
    yield "corrupt header", "flipped-size.png", flipped(picture, 18), f"{NO_IMAGE}|{DAMAGED}"
    yield "corrupt header", "flipped-header.gif", flipped(encode(NOISE, "GIF"), 3), NO_IMAGE
    yield "corrupt header", "flipped-tables.jpg", flipped(jpeg(NOISE), *range(20, 60)), f"{NO_IMAGE}|{DAMAGED}"
    yield "corrupt header", "flipped-frame.jpg", _no_components(), f"{NO_IMAGE}|{DAMAGED}"
    yield "corrupt header", "flipped-directory.tif", flipped(encode(NOISE, "TIFF"), 4, 5, 6, 7), f"{NO_IMAGE}|{DAMAGED}"
    yield "corrupt middle", "flipped-middle.png", flipped(noise, len(noise) // 2), CORRUPT
    yield "corrupt middle", "altered.png", _altered(), CORRUPT
    yield "corrupt middle", "flipped-middle.webp", _flipped_webp(), DAMAGED
    yield "corrupt middle", "zeros-in-middle.png", patched(noise, 4000, bytes(999)), CORRUPT


def _no_images() -> Iterator[File]:
    page = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    yield "no image", "page.jpg", page, NO_IMAGE
    yield "no image", "text.png", "Not an image, \u00e4hem.\n".encode() * 50, NO_IMAGE
    yield "no image", "utf16.png", ("text" * 50).encode("utf-16"), NO_IMAGE
    yield "no image", "zeros.jpg", bytes(4096), NO_IMAGE
    yield "no image", "archive.png", b"PK\3\4" + bytes(96), NO_IMAGE
    yield "no image", "vector.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", NO_IMAGE
    yield "no image", "postscript.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", NO_IMAGE
    yield "no image", "no-side.png", png_header(0, 5, 8, 2) + chunk(b"IDAT", zlib.compress(b"")), NO_IMAGE


def _bombs() -> Iterator[File]:
    yield "bombs", "bomb.png", bomb(), TOO_LARGE
    gif = encode(NOISE, "GIF")
    yield "bombs", "bomb.gif", patched(gif, 6, b"\xff\xff\xff\xff"), TOO_LARGE
    picture = jpeg()
    yield "bombs", "bomb.jpg", patched(picture, picture.index(b"\xff\xc0") + 5, b"\xff\xf0\xff\xf0"), TOO_LARGE
    yield "bombs", "bomb.bmp", patched(encode(NOISE, "BMP"), 18, struct.pack("<ii", 50000, 50000)), TOO_LARGE
    tags = encode(inks(), "TIFF")
    yield "bombs", "bomb.tif", _with_sides(tags, 50000), TOO_LARGE
    # 8 MB of zeros as a comment of 8 kB.
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(8 << 20), 9))
    yield "bombs", "bomb-comment.png", png(PICTURE, extra=text), CORRUPT


def _no_components() -> bytes:
    data = jpeg(NOISE)
    return patched(data, data.index(b"\xff\xc0") + 9, b"\0")


def _altered() -> bytes:
    """A PNG whose pixels decompress without an error, into other colours than its checksum was made of."""
    black = png(np.zeros_like(PICTURE))
    start, end = black.index(b"IDAT") + 4, -16
    return black[:end] + struct.pack(">I", zlib.crc32(b"IDAT" + flipped(black[start:end], 9))) + black[end + 4 :]


def _flipped_webp() -> bytes:
    data = encode(NOISE, "WEBP", lossless=True)
    # The start of the lossless stream, where the codes are described.
    return flipped(data, *range(26, 60))


def _with_sides(tiff: bytes, side: int) -> bytes:
    start = struct.unpack("<I", tiff[4:8])[0] + 2
    for entry in range(start, start + 24, 12):
        assert struct.unpack("<H", tiff[entry : entry + 2])[0] in (0x100, 0x101)
        tiff = patched(tiff, entry + 2, struct.pack("<HII", 4, 1, side))
    return tiff
