import io
import resource
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from spice_ray.readers.decode import MAX_PIXELS, Reject, decode

UPRIGHT = np.random.default_rng(0).integers(0, 256, (13, 8, 3), dtype=np.uint8)
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT, 1),
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(UPRIGHT, -1),
}


def encoded(image: Image.Image | NDArray[Any], format_: str = "PNG", **options: Any) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(np.ascontiguousarray(image))
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG made by hand, whose header may lie; colour 0 is grey, 2 RGB, 4 grey with alpha."""

    def chunk(tag: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def middle(data: bytes, size: int = 8) -> list[int]:
    return [int(value) for value in decode(data, size)[:, size // 2, size // 2]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["PNG", "TIFF"])
def test_every_exif_orientation_is_shown_upright(orientation: int, format_: str) -> None:
    # 13 x 8 leaves an odd margin: the centre square must be cut from the upright image.
    data = encoded(STORED[orientation], format_, exif=exif(orientation))
    assert np.array_equal(decode(data, 8), UPRIGHT[2:10].transpose(2, 0, 1))


def test_a_jpeg_from_a_turned_camera_is_shown_upright() -> None:
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:8] = 255
    data = encoded(np.rot90(picture, 1), "JPEG", exif=exif(6), quality=95)
    assert decode(data, 32)[:, 2].min() > 240
    assert decode(data, 32)[:, 16].max() < 15


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_out_of_range_leaves_the_pixels_as_they_are(orientation: int) -> None:
    data = encoded(UPRIGHT[:8], exif=exif(orientation))
    assert np.array_equal(decode(data, 8), UPRIGHT[:8].transpose(2, 0, 1))


@pytest.mark.filterwarnings("error")
def test_broken_exif_data_leaves_the_pixels_as_they_are() -> None:
    # A warning would fail the test: a million of them would bury the log.
    data = encoded(UPRIGHT[:8], exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 9)
    assert np.array_equal(decode(data, 8), UPRIGHT[:8].transpose(2, 0, 1))


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.array([[0, 128, 129, 257], [32896, 65535, 65406, 65407]] * 2, np.uint16)
    expected = np.array([[0, 0, 1, 1], [128, 255, 254, 255]] * 2)
    assert np.array_equal(decode(encoded(values), 4), np.stack([expected] * 3))


def test_sixteen_bit_rgb_is_scaled_and_not_clipped() -> None:
    pixel = struct.pack(">3H", 0, 32896, 65535)
    assert decode(png(1, 1, 16, 2, b"\0" + pixel), 1)[:, 0, 0].tolist() == [0, 128, 255]


def test_sixteen_bit_grey_of_a_portable_graymap_is_scaled() -> None:
    data = b"P5 2 2 65535\n" + struct.pack(">4H", 0, 32896, 65535, 257)
    assert decode(data, 2)[0].tolist() == [[0, 128], [255, 1]]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), [255, 255, 255]),
        (Image.new("RGBA", (8, 8), (0, 0, 0, 102)), [153, 153, 153]),
        (Image.new("RGBA", (8, 8), (9, 8, 7, 255)), [9, 8, 7]),
        (Image.new("LA", (8, 8), (50, 0)), [255, 255, 255]),
        (Image.new("LA", (8, 8), (50, 255)), [50, 50, 50]),
        (Image.new("L", (8, 8), 77), [77, 77, 77]),
        (Image.new("1", (8, 8), 1), [255, 255, 255]),
    ],
    ids=["clear", "part-clear", "opaque", "clear-grey", "opaque-grey", "grey", "bitmap"],
)
def test_transparency_is_laid_on_white(image: Image.Image, expected: list[int]) -> None:
    assert middle(encoded(image)) == expected


def test_the_clear_colour_of_a_palette_becomes_white() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert middle(encoded(image)) == [10, 20, 30]
    assert middle(encoded(image, transparency=1)) == [255, 255, 255]


def test_a_cmyk_jpeg_becomes_rgb() -> None:
    red = decode(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95), 16)[:, 8, 8]
    assert red[0] > 245
    assert red[1:].max() < 10


@pytest.mark.parametrize("format_", ["GIF", "WEBP", "PNG"])
def test_an_animation_shows_its_first_frame(format_: str) -> None:
    first, second = Image.new("RGB", (8, 8), (255, 255, 255)), Image.new("RGB", (8, 8), (0, 0, 0))
    data = encoded(first, format_, save_all=True, append_images=[second], lossless=True)
    assert middle(data) == [255, 255, 255]


def test_an_image_of_the_right_size_comes_back_untouched() -> None:
    assert np.array_equal(decode(encoded(UPRIGHT[:8]), 8), UPRIGHT[:8].transpose(2, 0, 1))
    assert decode(encoded(UPRIGHT[:8]), 8).dtype == np.uint8


def test_the_centre_square_is_kept() -> None:
    picture = np.zeros((8, 24, 3), np.uint8)
    picture[:, 8:16] = 200
    assert np.array_equal(decode(encoded(picture), 8), np.full((3, 8, 8), 200))


def test_shrinking_averages_instead_of_skipping_pixels() -> None:
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    assert np.abs(decode(encoded(board), 8).astype(int) - 127.5).max() < 3


def test_a_large_jpeg_is_decoded_like_a_full_decode_scaled_down() -> None:
    y, x = np.mgrid[0:900, 0:1200]
    picture = np.stack([x * 255 // 1199, y * 255 // 899, (x + y) * 255 // 2098], -1).astype(np.uint8)
    data = encoded(picture, "JPEG", quality=95)
    full = Image.open(io.BytesIO(data)).crop((150, 0, 1050, 900)).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.abs(decode(data, 32).astype(int) - np.asarray(full).transpose(2, 0, 1)).max() <= 2


@pytest.mark.parametrize("shape", [(1, 20000), (20000, 1)])
def test_a_strip_is_cut_before_it_is_scaled(shape: tuple[int, int]) -> None:
    strip = np.zeros(20000, np.uint8)
    strip[9999] = 90
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pixels = decode(encoded(strip.reshape(shape)), 256)
    assert np.array_equal(pixels, np.full((3, 256, 256), 90))
    # Scaled before it is cut, the strip would take 1.3 GB per channel.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_the_clear_value_of_a_sixteen_bit_png_becomes_white() -> None:
    # 256 would be the same grey as 257 in 8 bits, but it is not the value that is called clear.
    whole = png(3, 1, 16, 0, b"\0" + struct.pack(">3H", 256, 257, 32896))
    clear = b"\0\0\0\2tRNS" + struct.pack(">H", 257)
    data = whole[:33] + clear + struct.pack(">I", zlib.crc32(clear[4:])) + whole[33:]
    assert [middle(data_, 1) for data_ in (whole, data)] == [[1, 1, 1], [255, 255, 255]]
    left = png(1, 1, 16, 0, b"\0" + struct.pack(">H", 256))
    assert middle(left[:33] + data[33:47] + left[33:], 1) == [1, 1, 1]


def test_every_flipped_byte_among_the_pixels_of_a_png_is_noticed() -> None:
    # Plain areas: most flips decompress to other colours without an error.
    data = encoded(Image.new("RGB", (64, 64), (9, 8, 7)))
    start, end = data.index(b"IDAT") + 4, data.index(b"IEND") - 8
    for place in range(start, end):
        damaged = data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
        with pytest.raises(Reject, match="corrupt"):
            decode(damaged, 8)


def test_what_follows_the_end_of_a_png_is_not_looked_at() -> None:
    data = encoded(UPRIGHT[:8]) + b"\0\0\0\1IDAT?????" + b"\xff" * 50
    assert np.array_equal(decode(data, 8), UPRIGHT[:8].transpose(2, 0, 1))


NOISE = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
WHOLE_PNG, WHOLE_JPEG = encoded(NOISE), encoded(NOISE, "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"\0", "the file is not an image that can be read"),
        (b"<html>not found</html>", "the file is not an image that can be read"),
        (WHOLE_JPEG[:3], "the file is not an image that can be read"),
        (WHOLE_PNG[: len(WHOLE_PNG) // 2], "the image data is truncated"),
        (WHOLE_JPEG[: len(WHOLE_JPEG) // 2], "the image data is truncated"),
        (WHOLE_PNG[:100] + bytes(50) + WHOLE_PNG[150:], "the image data is corrupt"),
        (png(20000, 20000, 8, 2, b""), f"the image has more than {MAX_PIXELS} pixels"),
        (png(0, 5, 8, 2, b""), "the file is not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "the file is not an image"),
        (encoded(Image.new("F", (8, 8), 0.5), "TIFF"), "the pixels are floating-point numbers"),
        (encoded(Image.new("I", (8, 8), 1 << 20), "TIFF"), "the pixels are 32-bit numbers"),
    ],
    ids=[
        "empty",
        "one-byte",
        "html",
        "stub",
        "half-png",
        "half-jpeg",
        "bad-data",
        "bomb",
        "no-pixels",
        "eps",
        "float",
        "int32",
    ],
)
def test_hostile_bytes_are_rejected_with_their_reason(data: bytes, reason: str) -> None:
    with pytest.raises(Reject) as caught:
        decode(data, 8)
    assert caught.value.reason.startswith(reason)
    assert "0x" not in caught.value.reason


def test_the_pixel_limit_is_inclusive_and_silent() -> None:
    assert MAX_PIXELS == 17_895_697 * 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Reject, match="truncated"):
            decode(png(17_895_697, 10, 1, 0, b""), 8)
        with pytest.raises(Reject, match="more than"):
            decode(png(17_895_698, 10, 1, 0, b""), 8)


def test_every_cut_of_a_file_in_its_first_half_is_rejected() -> None:
    for data in (WHOLE_PNG, WHOLE_JPEG, encoded(NOISE, "GIF"), encoded(NOISE, "WEBP"), encoded(NOISE, "TIFF")):
        assert decode(data, 8).shape == (3, 8, 8)
        for end in range(0, len(data) // 2, max(1, len(data) // 40)):
            with pytest.raises(Reject, match=r"empty|not an image|truncated|corrupt"):
                decode(data[:end], 8)
