"""The hostile corpus of tests/hostile through this package and two others, and what our checks cost sound images.

    python -m benchmarks.hostile          # a Markdown table: what becomes of every group of files
    python -m benchmarks.hostile --clean  # decode() beside the same steps of plain Pillow

Each file lies in a folder of its own beside a sound one. Each is read by a process of its own, but for Ray's: there one
driver reads folder after folder until it hangs. The table takes two minutes.
"""

import argparse
import importlib.metadata
import io
import logging
import multiprocessing
import os
import platform
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from spice_ray.readers.decode import decode
from spice_ray.readers.source import open_source
from tests.hostile.corpus import Case, Good, Ignored, cases
from tests.hostile.pictures import STORED
from tests.hostile.reading import has_colours, is_expected, quadrants_of, read_chunks
from tests.hostile.sound import ORDINARY

CLASS, NEIGHBOUR = "class", "class/neighbour.png"
SECONDS, SECONDS_WITH_RAY = 20, 90
NUM_CLEAN, BLOCK, REPEATS, SIZE = 2000, 25, 9, 128

Found = list[tuple[str, Any]]
"""Name and pixels, uint8 (3, H, W), or the reason of a reject."""
Reader = Callable[[Path, Callable[[], None]], Found]
"""Lists a folder, calls the function while the files are listed and not yet read, and reads them."""


def read_ours(root: Path, listed: Callable[[], None]) -> Found:
    chunks = open_source(str(root)).chunks(9)
    listed()
    return list(read_chunks(chunks).items())


def read_image_folder(root: Path, listed: Callable[[], None]) -> Found:
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(str(root))
    listed()
    images = (folder[index][0] for index in range(len(folder)))
    return [(_name(path, root), _pixels(image)) for (path, _), image in zip(folder.samples, images, strict=True)]


def read_ray_images(root: Path, listed: Callable[[], None]) -> Found:
    import ray

    dataset = ray.data.read_images(str(root), mode="RGB", include_paths=True)
    listed()
    return [(_name(row["path"], root), _pixels(row["image"])) for row in dataset.take_all()]


def _name(path: str, root: Path) -> str:
    return os.fsencode(os.path.relpath(path, root)).decode("utf-8", "backslashreplace")


def _pixels(image: Any) -> NDArray[np.uint8]:
    return np.asarray(image).transpose(2, 0, 1)


def verdict(case: Case, found: Found) -> str:
    """What became of the case, in a word."""
    names = Counter(name for name, _ in found)
    own = f"{CLASS}/{case.source}"
    if names[NEIGHBOUR] != 1 or names[own] > 1 or set(names) - {NEIGHBOUR, own}:
        return "silently wrong"
    if not names[own]:
        return "ok" if isinstance(case.expected, Ignored) else "left out"
    image = dict(found)[own]
    if is_expected(case, image):
        return "ok"
    if isinstance(case.expected, Ignored):
        return "read"
    return "wrong orientation" if _is_only_turned(case.expected, image) else "silently wrong"


def _is_only_turned(expected: object, image: Any) -> bool:
    if not isinstance(expected, Good) or isinstance(image, str):
        return False
    upright = image.transpose(1, 2, 0)
    return any(has_colours(expected, quadrants_of(_pixels(turn(upright)))) for turn in STORED.values())


def _judge(case: Case, read: Reader) -> str:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / CLASS).mkdir()
        (root / NEIGHBOUR).write_bytes(ORDINARY)
        case.write(root / CLASS)
        try:
            return verdict(case, read(root, lambda: case.vanish(root / CLASS)))
        except Exception:
            # Whatever it is, it ends the reading of all the files.
            return "crash"


def _serve(connection: Connection, read: Reader, known: list[Case]) -> None:
    """Judge the cases that are named through the connection; they themselves cannot travel."""
    by_name = {case.name: case for case in known}
    while name := connection.recv():
        connection.send(_judge(by_name[name], read))


def _serve_ray(connection: Connection) -> None:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    _serve(connection, read_ray_images, cases())


class Helper:
    """A process that judges cases, replaced when it dies or hangs."""

    def __init__(self, serve: Callable[..., None], *args: object, method: str, seconds: float) -> None:
        self._serve, self._args = serve, args
        self._context: Any = multiprocessing.get_context(method)
        self._seconds = seconds
        self._start()

    def judge(self, case: Case) -> str:
        """The verdict of the process, or that it crashed or hung."""
        self._connection.send(case.name)
        if not self._connection.poll(self._seconds):
            self.stop()
            self._start()
            return "hang"
        try:
            return str(self._connection.recv())
        except EOFError:
            self._start()
            return "crash"

    def stop(self) -> None:
        """End the process whatever it does."""
        self._process.kill()
        self._process.join()

    def _start(self) -> None:
        self._connection, other = self._context.Pipe()
        self._process = self._context.Process(target=self._serve, args=(other, *self._args))
        self._process.start()
        other.close()


def judge_alone(case: Case, read: Reader) -> str:
    """The verdict of a process that does nothing else."""
    helper = Helper(_serve, read, [case], method="fork", seconds=SECONDS)
    try:
        return helper.judge(case)
    finally:
        helper.stop()


def table() -> Iterator[str]:
    """The Markdown table: groups of files down, readers across."""
    import torchvision.datasets  # noqa: F401 (once, before all the processes that use it)

    # To root no file is closed; a test reads this one as another user.
    wanted = [case for case in cases() if case.group != "no permission" or os.geteuid() != 0]
    found: dict[str, list[Counter[str]]] = {}
    ray_helper = Helper(_serve_ray, method="spawn", seconds=SECONDS_WITH_RAY)
    for case in wanted:
        words = [judge_alone(case, read_ours), judge_alone(case, read_image_folder), ray_helper.judge(case)]
        for counter, word in zip(found.setdefault(case.group, [Counter() for _ in words]), words, strict=True):
            counter[word] += 1
    ray_helper.stop()
    yield "| files | number | spice_ray | torchvision ImageFolder | ray.data.read_images |"
    yield "|---|---:|---|---|---|"
    for group, counters in found.items():
        yield f"| {group} | {counters[0].total()} | {' | '.join(map(_cell, counters))} |"
    totals = [sum(column, Counter[str]()) for column in zip(*found.values(), strict=True)]
    yield f"| all | {len(wanted)} | {' | '.join(map(_cell, totals))} |"


def _cell(counter: Counter[str]) -> str:
    if len(counter) == 1:
        return next(iter(counter))
    return ", ".join(f"{word} {count}" for word, count in counter.most_common())


def photograph(number: int) -> bytes:
    """A JPEG of 200 x 150 of smooth shapes and some grain, 10 kB."""
    draw = np.random.default_rng(number)
    shapes = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(shapes.resize((200, 150), Image.Resampling.BICUBIC)).astype(int)
    grain = draw.integers(-12, 13, (150, 200, 1))
    buffer = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def plain_image(data: bytes) -> Image.Image:
    opened = Image.open(io.BytesIO(data))
    opened.load()
    image = opened.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def plain_array(data: bytes) -> NDArray[np.uint8]:
    return np.ascontiguousarray(np.asarray(plain_image(data)).transpose(2, 0, 1))


def ours(data: bytes) -> NDArray[np.uint8]:
    return decode(data, SIZE)


def clean() -> Iterator[str]:
    """Medians over the images of the least CPU time of nine, the three ways taking turns on blocks of 25 images."""
    ways: tuple[Callable[[bytes], object], ...] = (plain_image, plain_array, ours)
    files = [photograph(number) for number in range(NUM_CLEAN)]
    assert all(np.array_equal(plain_array(data), ours(data)) for data in files[:BLOCK])
    seconds = np.full((len(ways), REPEATS, NUM_CLEAN), np.inf)
    # An image's repeats lie seconds apart: what else the machine does slows one of them and not all.
    for turn in range(REPEATS):
        for block in range(0, NUM_CLEAN, BLOCK):
            for way in random.Random(block + turn).sample(range(len(ways)), len(ways)):
                for number in range(block, block + BLOCK):
                    seconds[way, turn, number] = _seconds(ways[way], files[number])
    image, array, own = np.median(seconds.min(axis=1), axis=1) * 1e6
    yield "| | microseconds of CPU per image | beside Pillow to an array |"
    yield "|---|---:|---:|"
    yield f"| Pillow: open, load, convert, crop, resize | {image:.1f} | {image / array:.4f} |"
    yield f"| the same and an array, channels first | {array:.1f} | 1 |"
    yield f"| decode() | {own:.1f} | {own / array:.4f} |"


def _seconds(way: Callable[[bytes], object], data: bytes) -> float:
    start = time.thread_time()
    way(data)
    return time.thread_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", action="store_true", help="what the checks cost sound images, and nothing else")
    for line in clean() if parser.parse_args().clean else table():
        print(line)
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("pillow", "torchvision", "ray"))
    print(f"\nPython {platform.python_version()}, {', '.join(versions)}")


if __name__ == "__main__":
    main()
