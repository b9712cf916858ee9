import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from spice_ray.readers.decode import Reject, decode

RGB = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def png(pixels: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


def test_grey_arrays_are_copied_to_three_channels() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    before = grey.copy()
    assert np.array_equal(decode(grey, 8), np.stack([grey] * 3))
    assert decode(grey, 16).shape == (3, 16, 16)
    assert np.array_equal(grey, before)


def test_arrays_of_one_three_and_four_channels_give_their_pixels() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert np.array_equal(decode(grey[:, :, None], 8), np.stack([grey] * 3))
    assert np.array_equal(decode(RGB, 8), RGB.transpose(2, 0, 1))
    # 102 of 255 black on white leaves 153.
    clear, part = np.full((8, 8, 4), [9, 8, 7, 0], np.uint8), np.full((8, 8, 4), [0, 0, 0, 102], np.uint8)
    assert np.array_equal(decode(clear, 8), np.full((3, 8, 8), 255))
    assert np.array_equal(decode(part, 8), np.full((3, 8, 8), 153))


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_an_array_is_decoded_like_the_file_that_holds_it_and_left_alone(channels: int | None) -> None:
    shape = (23, 31) if channels is None else (23, 31, channels)
    pixels = np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)
    # A view with steps, as a memory-mapped array of another order gives.
    view = pixels[::-1, ::2]
    before = view.copy()
    assert np.array_equal(decode(view, 12), decode(png(view[:, :, 0] if channels == 1 else view), 12))
    assert np.array_equal(view, before)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((8, 8), np.uint16),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8, 2), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((1, 8, 8, 3), np.uint8),
        np.zeros(64, np.uint8),
    ],
    ids=lambda pixels: f"{pixels.dtype}-{'x'.join(map(str, pixels.shape))}",
)
def test_an_array_of_another_shape_or_type_is_a_fault_of_the_program(pixels: NDArray[Any]) -> None:
    with pytest.raises(AssertionError):
        decode(pixels, 8)


def test_the_result_is_the_callers_own_to_write_on() -> None:
    for size in (1, 8):
        pixels = decode(RGB, size)
        assert pixels.flags.writeable
        assert pixels.flags.c_contiguous


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 8, 1), (8, 0, 3), (0, 0, 4)])
def test_an_array_without_pixels_is_rejected(shape: tuple[int, ...]) -> None:
    with pytest.raises(Reject, match="no pixels"):
        decode(np.empty(shape, np.uint8), 8)
