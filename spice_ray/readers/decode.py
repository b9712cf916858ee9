"""From encoded bytes to square RGB pixels, or a reason why not.

S side of the square in pixels.
"""

import io
import warnings
import zlib
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

# Pillow's own limit, twice its MAX_IMAGE_PIXELS: 0.7 GB of RGBA.
MAX_PIXELS = 178_956_970
_TOO_LARGE = f"the image has more than {MAX_PIXELS} pixels, which would fill the memory"
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# How many times finer than the result the cheap first reductions leave an image at least.
_REDUCING_GAP = 3.0
# Turned to RGB at a time: on the way an image of 16 bits or with transparency takes up to 24 bytes per pixel.
_STRIP_PIXELS = 1 << 20


class Reject(Exception):  # noqa: N818 (the outcome for one image, not a fault of the program)
    """An image that cannot be used, and why."""

    @property
    def reason(self) -> str:
        """The sentence that rejects.parquet lists."""
        return str(self)


def decode(data: bytes | NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The centre square of an image, scaled to ``size``.

    EXIF orientation is applied, the first frame of an animation taken, transparency laid on white, 16 bits per channel
    scaled to 8. The square is cut before it is scaled, so that a 20000 x 1 strip costs no memory.

    Args:
        data: An encoded image, or pixels as uint8: grey (H, W) or (H, W, 1), RGB (H, W, 3), RGBA (H, W, 4).
        size: S, > 0.

    Returns:
        uint8 RGB, channels first, (3, S, S). An image of S x S pixels comes back untouched.

    Raises:
        Reject: Empty, not an image, truncated, corrupt, without pixels, or too large to decode.
    """
    square = _array_square(data, size) if isinstance(data, np.ndarray) else _decoded_square(data, size)
    # As lines of red, green and blue, so that the transposition moves whole rows and not single bytes.
    lines = np.frombuffer(square.tobytes("raw", "RGB;L"), np.uint8).reshape(size, 3, size)
    return lines.transpose(1, 0, 2).copy()


def _array_square(pixels: NDArray[np.uint8], size: int) -> Image.Image:
    assert pixels.dtype == np.uint8, pixels.dtype
    assert pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4)), pixels.shape
    if pixels.size == 0:
        raise Reject("the image has no pixels")
    # Pillow takes one channel without an axis of its own only.
    return _square(Image.fromarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels), size)


def _decoded_square(data: bytes, size: int) -> Image.Image:
    if not data:
        raise Reject("the file is empty")
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd EXIF data, and of half the pixels that are allowed here.
            warnings.simplefilter("ignore")
            return _square(_load(data, size), size)
    except Reject:
        raise
    except Image.DecompressionBombError:
        raise Reject(_TOO_LARGE) from None
    except UnidentifiedImageError:
        raise Reject("the file is not an image that can be read") from None
    except Exception as error:
        # Whatever a decoder makes of hostile bytes, this one image is listed as a reject and the others go on.
        raise Reject(_broken(error)) from None


def _load(data: bytes, size: int) -> Image.Image:
    """The upright image with all its pixels."""
    image = Image.open(io.BytesIO(data), formats=_formats())
    if image.format == "PNG":
        _check_pixel_chunks(data)
    if image.width * image.height > MAX_PIXELS:
        raise Reject(_TOO_LARGE)
    # A large JPEG is decoded at a half, a quarter or an eighth; twice the size is left for a clean last step.
    image.draft(None, (2 * size, 2 * size))
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _check_pixel_chunks(data: bytes) -> None:
    """Compare the checksums of a PNG's pixels, the only ones that Pillow skips: a flipped bit would go unnoticed."""
    view, start = memoryview(data), len(_PNG_SIGNATURE)
    # Where a chunk is cut short the loop ends: Pillow says so when it loads the pixels.
    while (end := start + 8 + int.from_bytes(view[start : start + 4], "big")) + 4 <= len(data):
        kind = data[start + 4 : start + 8]
        if kind == b"IEND":
            return
        if kind == b"IDAT" and zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise Reject("the image data is corrupt (wrong checksum)")
        start = end + 4


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    # Pillow hands EPS to Ghostscript, a program that runs what the file says.
    return tuple(name for name in Image.ID if name != "EPS")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        # Broken EXIF data around sound pixels: take them as they are.
        return 1


def _square(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    factor = max(1, int(side / size / _REDUCING_GAP))
    rgb = _reduced_rgb(image, side, factor)
    if side == size:
        return rgb
    end = side / factor
    return rgb.resize((size, size), Image.Resampling.BICUBIC, box=(0, 0, end, end))


def _reduced_rgb(image: Image.Image, side: int, factor: int) -> Image.Image:
    """The centre square in RGB; each of its pixels is the mean of ``factor`` x ``factor``."""
    left, top = (image.width - side) // 2, (image.height - side) // 2
    rows = max(1, _STRIP_PIXELS // side // factor) * factor
    if rows >= side:
        is_square = image.size == (side, side)
        rgb = _to_rgb(image if is_square else image.crop((left, top, left + side, top + side)))
        return rgb if factor == 1 else rgb.reduce(factor)
    reduced_side = -(-side // factor)
    reduced = Image.new("RGB", (reduced_side, reduced_side))
    for start in range(0, side, rows):
        strip = image.crop((left, top + start, left + side, top + min(start + rows, side)))
        reduced.paste(_to_rgb(strip).reduce(factor), (0, start // factor))
    return reduced


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _eight_bit(image)
    if image.mode == "F":
        raise Reject("the pixels are floating-point numbers of no known range")
    if not image.has_transparency_data:
        # Pillow would copy an image that is RGB already.
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits (Pillow's I;16 modes, or I where the format has no such mode) in 8."""
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise Reject("the pixels are 32-bit numbers of no known range")
    # 65535 = 255 * 257, so this is x * 255 / 65535, rounded.
    grey = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        # The one value that a PNG may call clear, of all 16 bits.
        grey.putalpha(Image.fromarray(np.where(pixels == clear, 0, 255).astype(np.uint8)))
    return grey


def _broken(error: Exception) -> str:
    # Pillow's own text can hold a memory address, which would differ from run to run.
    if "truncated" in str(error).lower():
        return "the image data is truncated"
    return f"the image data is corrupt ({type(error).__name__})"
