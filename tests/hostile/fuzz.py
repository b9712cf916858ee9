"""Decode random mutations of sound files in a process of its own, and say what came and how much memory it took.

python -m tests.hostile.fuzz SEED COUNT prints one JSON object.
"""

import json
import random
import sys
from collections import Counter

import numpy as np

from spice_ray.readers.decode import Reject, decode
from tests.hostile.memory import peak_megabytes
from tests.hostile.pictures import PICTURE, encode, jpeg, png, with_exif

SIZE = 16
_EXTREMES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\xff\xff")


def originals() -> list[bytes]:
    """Sound files of the formats that people have."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return [
        jpeg(noise),
        jpeg(progressive=True),
        with_exif(b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"),
        png(noise),
        png(PICTURE, interlaced=True),
        encode(PICTURE, "GIF"),
        encode(noise, "WEBP"),
        encode(PICTURE, "WEBP", lossless=True),
        encode(noise, "TIFF"),
        encode(PICTURE, "TIFF", compression="tiff_lzw"),
    ]


def mutated(data: bytes, draw: random.Random) -> bytes:
    """The bytes with one to four random changes, half of them among the first hundred, where headers are."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(min(100, len(changed)) if draw.random() < 0.5 else len(changed))
        length = draw.randint(1, 64)
        kind = draw.randrange(5)
        if kind == 0:
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[place : place + 4] = draw.choice(_EXTREMES)
        elif kind == 2:
            del changed[place : place + length]
        elif kind == 3:
            changed[place:place] = changed[place : place + length]
        else:
            changed[place : place + length] = draw.randbytes(length)
    return bytes(changed)


def outcome(data: bytes) -> str:
    """What came of the bytes; anything but the first two is a fault."""
    try:
        image = decode(data, SIZE)
    except Reject:
        return "reject"
    except Exception as error:
        return type(error).__name__
    return "image" if image.shape == (3, SIZE, SIZE) and image.dtype == np.uint8 else "not an image"


def main(seed: int, count: int) -> None:
    """Print how often each outcome came, and by how many MB the peak of the memory rose."""
    draw, files = random.Random(seed), originals()
    counts = Counter(outcome(data) for data in files)
    before = peak_megabytes()
    counts += Counter(outcome(mutated(draw.choice(files), draw)) for _ in range(count))
    print(json.dumps({"outcomes": counts, "megabytes": peak_megabytes() - before}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
