"""Files of the corpus that hold a picture, however odd: (group, name, content, colours that must come)."""

import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageCms, features

from tests.hostile.pictures import (
    BLACK,
    BLUE,
    COLOURS,
    GREEN,
    PICTURE,
    RED,
    SAND,
    WHITE,
    Pixels,
    Quadrants,
    animated,
    chunk,
    encode,
    inks,
    jpeg,
    png,
    quadrants,
    turned,
    with_exif,
    without_segment,
    ycck,
)

File = tuple[str, str, bytes, Quadrants]
ORDINARY = png(PICTURE)
GREYS = (10, 90, 160, 230)
_FOUR_GREYS: Quadrants = ((10, 10, 10), (90, 90, 90), (160, 160, 160), (230, 230, 230))
_CLEAR_FIRST: Quadrants = (WHITE, GREEN, BLUE, SAND)
_ORIENTED = "EXIF orientation 2-8"


def gif() -> bytes:
    """The picture as a GIF."""
    return encode(_palette(), "GIF")


def webp() -> bytes:
    """The picture as a lossless WebP."""
    return encode(PICTURE, "WEBP", lossless=True)


def exact() -> Iterator[File]:
    """Files whose colours must come unchanged."""
    yield from _common()
    yield from _depths()
    yield from _transparent()
    yield from _formats()
    yield from _animations()
    for side in ((1, 1), (1, 20000), (20000, 1)):
        yield "extreme sides", f"{side[1]}x{side[0]}.png", png(np.full((*side, 3), RED, np.uint8)), (RED,) * 4
    for orientation in range(1, 9):
        group = _ORIENTED if orientation > 1 else "ordinary"
        yield group, f"orientation-{orientation}.png", turned(orientation, "PNG"), COLOURS
    yield _ORIENTED, "orientation-6.tif", turned(6, "TIFF"), COLOURS
    yield _ORIENTED, "orientation-6-lossless.webp", turned(6, "WEBP", lossless=True), COLOURS


def close() -> Iterator[File]:
    """Files whose colours come within the loss of their format."""
    yield "ordinary", "ordinary.jpg", jpeg(), COLOURS
    yield "grey", "grey.jpg", jpeg(quadrants(GREYS)), _FOUR_GREYS
    yield "progressive, interlaced", "progressive.jpg", jpeg(progressive=True), COLOURS
    yield "ICC profile", "profile.jpg", jpeg(icc_profile=_profile()), COLOURS
    yield "ICC profile", "broken-profile.jpg", jpeg(icc_profile=b"no profile" * 9), COLOURS
    for orientation in range(1, 9):
        group = _ORIENTED if orientation > 1 else "ordinary"
        yield group, f"orientation-{orientation}.jpg", turned(orientation, "JPEG", quality=95, subsampling=0), COLOURS
    yield "CMYK JPEG", "cmyk-adobe.jpg", jpeg(inks()), COLOURS
    yield "CMYK JPEG", "cmyk-no-marker.jpg", without_segment(jpeg(inks()), 0xEE), COLOURS
    yield "CMYK JPEG", "ycck.jpg", ycck(), COLOURS
    for name, body in _exif_bodies():
        yield "broken EXIF", f"exif-{name}.jpg", with_exif(body), COLOURS
    yield "JPEG of several pictures", "pair.jpg", animated("MPO", quality=95, subsampling=0), COLOURS
    if features.check("jpg_2000"):
        yield "JPEG 2000", "wavelets.jp2", encode(PICTURE, "JPEG2000", irreversible=True, quality_layers=[5]), COLOURS
    if features.check("avif"):
        yield "AVIF", "still.avif", encode(PICTURE, "AVIF", quality=95, subsampling="4:4:4"), COLOURS
        yield _ORIENTED, "orientation-6.avif", turned(6, "AVIF", quality=95, subsampling="4:4:4"), COLOURS


def _common() -> Iterator[File]:
    yield "ordinary", "ordinary.png", ORDINARY, COLOURS
    yield "progressive, interlaced", "interlaced.png", png(PICTURE, interlaced=True), COLOURS
    yield "grey", "grey.png", png(quadrants(GREYS)), _FOUR_GREYS
    yield "palette", "palette.png", encode(_palette(), "PNG"), COLOURS
    yield "ICC profile", "profile.png", encode(PICTURE, "PNG", icc_profile=_profile()), COLOURS
    yield "trailing data", "trailing.png", ORDINARY + b"<html>" * 99, COLOURS


def _depths() -> Iterator[File]:
    bits = Image.fromarray(quadrants((0, 255, 255, 255))).convert("1")
    corners: Quadrants = (BLACK, WHITE, WHITE, WHITE)
    yield "1 bit", "bits.png", encode(bits, "PNG"), corners
    yield "1 bit", "bits.tif", encode(bits, "TIFF", compression="group4"), corners
    wide = np.array(GREYS, np.uint16) * 257
    yield "16 bits", "deep-grey.png", png(quadrants(wide, np.uint16)), _FOUR_GREYS
    yield "16 bits", "deep-grey.tif", encode(quadrants(wide, np.uint16), "TIFF"), _FOUR_GREYS
    yield "16 bits", "deep-rgb.png", png(PICTURE.astype(np.uint16) * 257), COLOURS
    yield "16 bits", "deep-interlaced.png", png(PICTURE.astype(np.uint16) * 257, interlaced=True), COLOURS


def _transparent() -> Iterator[File]:
    group = "transparency"
    # Black under the clear quadrant: who drops the alpha channel sees it.
    rgba = quadrants(((0, 0, 0, 0), (0, 0, 0, 102), (*BLUE, 255), (*SAND, 255)))
    laid: Quadrants = (WHITE, (153, 153, 153), BLUE, SAND)
    yield group, "rgba.png", encode(rgba, "PNG"), laid
    yield group, "rgba.webp", encode(rgba, "WEBP", lossless=True, exact=True), laid
    yield group, "rgba.tif", encode(rgba, "TIFF"), laid
    yield group, "rgba.ico", encode(_square(rgba), "ICO", sizes=[(32, 32)]), laid
    grey_alpha = quadrants(((50, 0), (0, 102), (160, 255), (230, 255)))
    grey_laid: Quadrants = (WHITE, (153, 153, 153), (160, 160, 160), (230, 230, 230))
    yield group, "grey-alpha.png", encode(Image.fromarray(grey_alpha, "LA"), "PNG"), grey_laid
    yield group, "palette-clear.png", encode(_palette(), "PNG", transparency=0), _CLEAR_FIRST
    yield group, "palette-clear.gif", encode(_palette(), "GIF", transparency=0), _CLEAR_FIRST
    yield group, "key-rgb.png", png(PICTURE, extra=_key(*RED)), _CLEAR_FIRST
    yield (
        group,
        "key-deep-rgb.png",
        png(PICTURE.astype(np.uint16) * 257, extra=_key(*(v * 257 for v in RED))),
        _CLEAR_FIRST,
    )
    first_clear: Quadrants = (WHITE, *_FOUR_GREYS[1:])
    yield group, "key-grey.png", png(quadrants(GREYS), extra=_key(10)), first_clear
    wide = quadrants(np.array(GREYS, np.uint16) * 257, np.uint16)
    yield group, "key-deep-grey.png", png(wide, extra=_key(2570)), first_clear


def _formats() -> Iterator[File]:
    yield "BMP", "bitmap.bmp", encode(PICTURE, "BMP"), COLOURS
    yield "TIFF", "plain.tif", encode(PICTURE, "TIFF"), COLOURS
    yield "TIFF", "packed.tiff", encode(PICTURE, "TIFF", compression="tiff_lzw"), COLOURS
    yield "TIFF", "inks.tif", encode(inks(), "TIFF"), COLOURS
    yield "TIFF", "pages.tif", animated("TIFF"), COLOURS
    yield "icons", "icon.ico", encode(_square(PICTURE), "ICO", sizes=[(32, 32)]), COLOURS
    yield "icons", "icon-bitmap.ico", encode(_square(PICTURE), "ICO", sizes=[(32, 32)], bitmap_format="bmp"), COLOURS
    yield "WebP", "lossless.webp", webp(), COLOURS
    yield "other formats", "map.ppm", encode(PICTURE, "PPM"), COLOURS
    yield "other formats", "targa.tga", encode(PICTURE, "TGA"), COLOURS
    yield "other formats", "still.gif", gif(), COLOURS


def _animations() -> Iterator[File]:
    yield "animations", "moving.gif", encode(_palette(), "GIF", save_all=True, append_images=[_black()]), COLOURS
    yield "animations", "moving.webp", animated("WEBP", lossless=True), COLOURS
    yield "animations", "moving.png", animated("PNG"), COLOURS
    yield "animations", "moving.apng", animated("PNG"), COLOURS


def _exif_bodies() -> Iterator[tuple[str, bytes]]:
    yield "garbage", b"\xff\x00" * 40
    yield "endless", b"II*\0\xff\xff\xff\xff" + b"\xff" * 9
    # One entry, orientation: as text, as a number out of range, as 4 billion numbers, in a directory of 65,535 entries.
    yield "text", b"II*\0\x08\0\0\0" + struct.pack("<HHHI4sI", 1, 0x0112, 2, 4, b"six\0", 0)
    yield "nine", b"II*\0\x08\0\0\0" + struct.pack("<HHHIII", 1, 0x0112, 3, 1, 9, 0)
    yield "many", b"II*\0\x08\0\0\0" + struct.pack("<HHHIII", 1, 0x0112, 3, 0xFFFFFFFF, 8, 0)
    yield "loop", b"II*\0\x08\0\0\0" + struct.pack("<HHHIII", 65535, 0x8769, 4, 1, 8, 8)


def _key(*values: int) -> bytes:
    """The chunk that calls one colour clear."""
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


def _palette() -> Image.Image:
    image = Image.fromarray(quadrants((0, 1, 2, 3)), "P")
    image.putpalette([value for colour in COLOURS for value in colour])
    return image


def _black() -> Image.Image:
    return Image.new("P", _palette().size)


def _square(pixels: Pixels) -> Pixels:
    # The middle of the picture: an icon is a square, and Pillow pads the lines of no other side rightly.
    return pixels[8:40, 16:48]


def _profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
