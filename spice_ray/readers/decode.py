"""From encoded bytes to square RGB pixels, or a reason why not.

S side of the square in pixels.
"""

import io
import warnings
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
# How many times finer than the result the cheap first reductions may leave an image.
_REDUCING_GAP = 3.0


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
        data: An encoded image, or a grey one as uint8, (H, W).
        size: S, > 0.

    Returns:
        uint8 RGB, channels first, (3, S, S). An image of S x S pixels comes back untouched.

    Raises:
        Reject: Empty, not an image, truncated, corrupt, without pixels, or too large to decode.
    """
    square = _grey_square(data, size) if isinstance(data, np.ndarray) else _decoded_square(data, size)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _grey_square(grey: NDArray[np.uint8], size: int) -> Image.Image:
    assert grey.ndim == 2, grey.shape
    assert grey.dtype == np.uint8, grey.dtype
    if grey.size == 0:
        raise Reject("the image has no pixels")
    return _square(Image.fromarray(grey), size)


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
    if image.width * image.height > MAX_PIXELS:
        raise Reject(_TOO_LARGE)
    # A large JPEG is decoded at a half, a quarter or an eighth; twice the size is left for a clean last step.
    image.draft(None, (2 * size, 2 * size))
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


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
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size != (side, side):
        image = image.crop((left, top, left + side, top + side))
    rgb = _to_rgb(image)
    if side == size:
        return rgb
    return rgb.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=_REDUCING_GAP)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _eight_bit(image)
    if image.mode == "F":
        raise Reject("the pixels are floating-point numbers of no known range")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits (Pillow's I;16 modes, or I where the format has no such mode) in 8."""
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise Reject("the pixels are 32-bit numbers of no known range")
    # 65535 = 255 * 257, so this is x * 255 / 65535, rounded.
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8))


def _broken(error: Exception) -> str:
    # Pillow's own text can hold a memory address, which would differ from run to run.
    if "truncated" in str(error).lower():
        return "the image data is truncated"
    return f"the image data is corrupt ({type(error).__name__})"
