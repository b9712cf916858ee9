import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spice_ray.readers.decode import Reject, decode
from tests.hostile.broken import bomb
from tests.hostile.fuzz import originals
from tests.hostile.pictures import encode

ROOT = Path(__file__).parents[2]
_REFUSE = """
from spice_ray.readers.decode import Reject, decode
from tests.hostile.broken import bomb
from tests.hostile.fuzz import originals
from tests.hostile.memory import peak_megabytes
decode(originals()[3], 16)
before = peak_megabytes()
try:
    decode(bomb(), 16)
except Reject:
    print(peak_megabytes() - before)
"""


def test_three_hundred_mutated_files_are_images_or_rejects_within_the_memory() -> None:
    command = [sys.executable, "-m", "tests.hostile.fuzz", "0", "300"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    # A crash of a decoder would be a negative return code.
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["outcomes"]) == {"image", "reject"}
    assert sum(found["outcomes"].values()) == 300 + len(originals())
    # Both must come, or the mutations are too weak or too strong to tell anything.
    assert min(found["outcomes"].values()) > 50
    assert found["megabytes"] < 300


def test_a_bomb_is_refused_from_its_header_in_milliseconds() -> None:
    with pytest.raises(Reject, match="more than"):
        decode(bomb(), 16)
    data, start = bomb(), time.process_time()
    for _ in range(20):
        with pytest.raises(Reject):
            decode(data, 16)
    # Seconds of CPU for each; 0.00006 measured.
    assert (time.process_time() - start) / 20 < 0.010


def test_a_bomb_is_refused_without_memory_for_its_pixels() -> None:
    done = subprocess.run([sys.executable, "-c", _REFUSE], cwd=ROOT, capture_output=True, text=True, check=True)
    # Its pixels would take 7.5 GB.
    assert float(done.stdout) < 20


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "I;16"])
@pytest.mark.parametrize("size", [32, 500])
def test_a_large_image_is_scaled_in_strips_as_it_would_be_in_one_piece(mode: str, size: int) -> None:
    # 1203 x 1400: two strips, and neither 12 nor 2 divides the side.
    blocks = np.random.default_rng(3).integers(0, 256, (401, 467, 4), dtype=np.uint8)
    pixels = blocks.repeat(3, 0).repeat(3, 1)[:, :1400]
    if mode == "P":
        image = Image.fromarray(pixels[:, :, 0], "P")
        image.putpalette(np.random.default_rng(4).integers(0, 256, 768).tolist())
    elif mode == "I;16":
        image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(pixels).convert(mode)
    grey = Image.fromarray(pixels[:, :, 0]) if mode == "I;16" else image
    white = Image.new("RGBA", image.size, "white")
    whole = Image.alpha_composite(white, grey.convert("RGBA")).convert("RGB").crop((98, 0, 1301, 1203))
    whole = whole.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
    assert np.array_equal(decode(encode(image, "PNG", compress_level=1), size), np.asarray(whole).transpose(2, 0, 1))


_PEAK = """
import zlib
from spice_ray.readers.decode import decode
from tests.hostile.memory import peak_megabytes
from tests.hostile.pictures import chunk, encode, png_header, quadrants
import numpy as np
decode(encode(quadrants((1, 2, 3, 4), np.uint16), "PNG"), 8)
packer, line = zlib.compressobj(1), bytes(10001)
packed = b"".join([*(packer.compress(line) for _ in range(5000)), packer.flush()])
data = png_header(5000, 5000, 16, 0) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
before = peak_megabytes()
decode(data, 32)
print(peak_megabytes() - before)
"""


def test_a_large_image_of_sixteen_bits_takes_little_more_memory_than_its_own_pixels() -> None:
    done = subprocess.run([sys.executable, "-c", _PEAK], cwd=ROOT, capture_output=True, text=True, check=True)
    # 50 MB of pixels; turned to 8 bits in one piece they would take 500 MB more.
    assert float(done.stdout) < 150
